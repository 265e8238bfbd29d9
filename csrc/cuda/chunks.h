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

// Calls body(vectors, indices, whole) for chunks of kLoads vectors per thread of the n numbers at
// `x`; before(k) comes before chunk k is read. Which thread takes which number when depends on n
// and the number of threads alone, not on how `x` is aligned. `whole` is std::true_type in the loop
// that has to be fast, where every vector is full.
template <class Rows, class In, class Before, class Body>
EM_DEVICE void for_each_chunk(const In* x, int n, const Before& before, const Body& body) {
  constexpr int width = Vector<In>::width;
  const int stride = block_threads() * width, chunk = kLoads * stride;
  const int past = Rows::all ? 0 : numbers_past(x);
  const bool aligned = Rows::all || (Rows::some && past == 0);
  const int whole = aligned ? n : n - width;
  Vector<In> v[kLoads];
  int at[kLoads], k = 0, begin = thread_index() * width;
  for (; (k + 1) * chunk <= whole; ++k, begin += chunk) {
    before(k);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) at[i] = begin + i * stride;
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) v[i] = load_aligned(x + at[i]);
    } else {
      load_past(x, past, at, v);
    }
    body(v, at, std::true_type());
  }
  for (; k * chunk < n; ++k, begin += chunk) {
    before(k);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      at[i] = begin + i * stride;
      v[i] = load_guarded(x, n, past, at[i]);
    }
    body(v, at, std::false_type());
  }
}

// This thread's share of the sums over the n numbers at `x`. kPlain: `transform` is simple and
// nothing beyond the first order is wanted.
template <class Rows, bool kPlain, class In, class Before>
EM_DEVICE Part<Real<In>> sum_up(
    const In* x, int n, const Transform<Real<In>>& transform, const Extras& extras,
    const Before& before) {
  using T = Real<In>;
  constexpr int width = Vector<In>::width;
  const Scaling<T> by = transform.scaling();
  if constexpr (kPlain) {
    Sums<Vector<In>, false> sums;
    const auto body = [&](Vector<In>(&v)[kLoads], const int(&at)[kLoads], auto) {
      sums.add(v, at, by, extras);
    };
    for_each_chunk<Rows>(x, n, before, body);
    return sums.total(by);
  } else {
    Sums<Lanes<T, width>, true> sums;
    const auto body = [&](Vector<In>(&v)[kLoads], const int(&at)[kLoads], auto) {
      Lanes<T, width> z[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k)
#pragma unroll
        for (int i = 0; i < width; ++i)
          z[k].lane[i] = at[k] + i < n ? transform.summand(v[k].get(i), at[k] + i) : T(-INFINITY);
      sums.add(z, at, by, extras);
    };
    for_each_chunk<Rows>(x, n, before, body);
    return sums.total(by);
  }
}

}  // namespace em_kernels::cuda
