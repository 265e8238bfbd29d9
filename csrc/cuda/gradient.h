// The gradient of a row, of which every thread stores what it has read the numbers of.
#pragma once

#include "chunks.h"

namespace em_kernels::cuda {

// kWhole: `count` is a whole vector.
template <bool kWhole, class Out, class T, int W>
EM_DEVICE void store_as(const Lanes<T, W>& g, void* out, int64_t at, int count) {
  Out* const to = static_cast<Out*>(out) + at;
  if constexpr (kWhole) {
    store_aligned(g, to);
  } else {
    store_guarded(g, to, count);
  }
}

template <class In, bool kWhole>
EM_DEVICE void store_gradient(
    const Lanes<Real<In>, Vector<In>::width>& g, void* out, DType dtype, int64_t at, int count) {
  if constexpr (sizeof(In) == 4) {
    if (dtype == DType::bf16) return store_as<kWhole, bf16>(g, out, at, count);
    if (dtype == DType::f16) return store_as<kWhole, f16>(g, out, at, count);
  }
  store_as<kWhole, In>(g, out, at, count);
}

template <class In>
EM_DEVICE void store_number(Real<In> g, void* out, DType dtype, int64_t at) {
  Lanes<Real<In>, Vector<In>::width> one;
  one.lane[0] = g;
  store_gradient<In, false>(one, out, dtype, at, 1);
}

// How many of n numbers of `out` come before the first vector that is stored at once.
template <class In>
EM_DEVICE int numbers_before(const void* out, int n, DType dtype) {
  const int size = size_of(dtype), bytes = size * Vector<In>::width;
  const int head = static_cast<int>(-reinterpret_cast<uintptr_t>(out) % bytes) / size;
  return head < n ? head : n;
}

// The gradient of the n numbers at `x` into `out`. Vectors are those of `out`, so all but its ends
// are stored whole. Rows says how those of `x` then begin.
//
// `out` may lie on the logits. Of the same width, a thread overwrites only what it has read itself.
// A narrow `out` begins at the row's first byte, so number i is written to where number i / 2 was:
// behind all that later chunks read, and within what the block has read once every thread has the
// numbers of its chunk in registers. Hence the one barrier per chunk.
//
// It is stored as usual: a product or the sum of a leaf's gradient is what reads it next.
template <class Rows, bool kPlain, class In, class Load>
EM_DEVICE void write_gradient(
    const In* x, int n, void* out, DType dtype, const Transform<Real<In>>& transform,
    const GradientTerms<Real<In>>& terms, const Load& load) {
  using T = Real<In>;
  constexpr int width = Vector<In>::width;
  const Scaling<T> by = transform.scaling();
  const bool narrow = sizeof(In) == 4 && dtype != DType::f32;
  const auto gradient = [&](T number, int index) -> T {
    if constexpr (kPlain) return terms({number, 1}, by);
    return index < n ? terms(transform(number, index), by) : T(0);
  };
  const int head = numbers_before<In>(out, n, dtype), thread = thread_index();
  if (head > 0) {
    const T g = thread < head ? gradient(load_one(x + thread), thread) : T(0);
    if (narrow) sync_block();
    if (thread < head) store_number<In>(g, out, dtype, thread);
  }
  const auto body = [&](Vector<In>(&v)[kLoads], const int(&at)[kLoads], auto whole) {
    if (narrow) sync_block();
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int first = head + at[k];
      Lanes<T, width> g;
      if (!kPlain && sizeof(In) < 8 && transform.simple) {
#pragma unroll
        for (int i = 0; i < width; ++i)
          g.lane[i] = terms({multiply(v[k].get(i), transform.by), 1}, by);
      } else {
#pragma unroll
        for (int i = 0; i < width; ++i) g.lane[i] = gradient(v[k].get(i), first + i);
      }
      store_gradient<In, decltype(whole)::value>(g, out, dtype, first, n - first);
    }
  };
  for_each_chunk<Rows>(x + head, {0, n - head, n - head}, 0, load, body);
}

}  // namespace em_kernels::cuda
