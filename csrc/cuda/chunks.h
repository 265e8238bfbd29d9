// A row in chunks: which thread reads which numbers of it, whole vectors at a time.
#pragma once

#include <type_traits>

#include "rows.h"

namespace em_kernels::cuda {

// What is known of where rows begin. An aligned row of Unaligned is read as the others are.
struct Aligned {
  static constexpr bool some = true, all = true;
};
struct Unaligned {
  static constexpr bool some = false, all = false;
};
struct Any {
  static constexpr bool some = true, all = false;
};

// Of the n numbers of a row, those from `begin` to `end`.
struct Range {
  int begin, end, n;
};

// Calls body(vectors, indices, whole) for chunks of kLoads vectors per thread of a range of the
// numbers at `x`, without the first `ahead` of them. Which thread takes which number when depends
// on the range and the number of threads alone, not on how `x` is aligned. `whole` is
// std::true_type in the loop that has to be fast, where every vector is full.
template <class Rows, class In, class Load, class Body>
EM_DEVICE void for_each_chunk(
    const In* x, const Range& range, int ahead, const Load& load, const Body& body) {
  constexpr int width = Vector<In>::width;
  const int stride = block_threads() * width, chunk = kLoads * stride, end = range.end;
  const int past = Rows::all ? 0 : numbers_past(x);
  const bool aligned = Rows::all || (Rows::some && past == 0);
  const int whole = aligned || end <= range.n - width ? end : range.n - width;
  Vector<In> v[kLoads];
  const int start = range.begin + ahead, count = whole - start, rest = end - start;
  int at[kLoads], k = 0, begin = start + thread_index() * width;
  const In* next = x + begin;
  for (; (k + 1) * chunk <= count; ++k, begin += chunk) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) at[i] = begin + i * stride;
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i, next += stride) v[i] = load(next);
    } else {
      load_past(x, past, at, v);
    }
    body(v, at, std::true_type());
  }
  for (; k * chunk < rest; ++k, begin += chunk) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      at[i] = begin + i * stride;
      v[i] = load_guarded(x, end, past, at[i]);
    }
    body(v, at, std::false_type());
  }
}

// This thread's share of the sums over a range of the numbers at `x`. Its first vector is what the
// sums begin with; all others are compared with what they hold. kPlain: u is x and nothing beyond
// the first order is wanted.
template <class Rows, bool kPlain, class In>
EM_DEVICE Part<Real<In>> sum_up(
    const In* x, const Range& range, const Transform<Real<In>>& transform,
    const Scaling<Real<In>>& by, const Extras& extras) {
  using T = Real<In>;
  constexpr int width = Vector<In>::width;
  const auto summands = [&](const Vector<In>& v, int at) {
    if constexpr (kPlain) {
      return v;
    } else {
      Lanes<T, width> u;
#pragma unroll
      for (int i = 0; i < width; ++i)
        u.lane[i] = at + i < range.end ? transform(v.get(i), at + i).u : T(-INFINITY);
      return u;
    }
  };
  using V = decltype(summands(Vector<In>(), 0));
  const int first = range.begin + thread_index() * width;
  const int past = Rows::all ? 0 : numbers_past(x);
  Sums<V, !kPlain> sums(summands(load_guarded(x, range.end, past, first), first), first, extras);
  const auto body = [&](const Vector<In>(&v)[kLoads], const int(&at)[kLoads], auto) {
    V u[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) u[k] = summands(v[k], at[k]);
    sums.add(u, at, by, extras);
  };
  for_each_chunk<Rows>(x, range, block_threads() * width, InGlobal<false>(), body);
  return sums.total(by);
}

}  // namespace em_kernels::cuda
