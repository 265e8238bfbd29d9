// Sixteen bytes of a row: what one thread loads and stores at a time.
#pragma once

#include "device.h"

namespace em_kernels::cuda {

// W numbers in registers. `keep_larger` leaves the larger of each two in `held` and gives back the
// smaller ones; a NaN stays in `held`.
template <class T_, int W>
struct alignas(16) Lanes {
  using T = T_;
  static constexpr int width = W;
  T lane[W];

  EM_DEVICE T get(int i) const { return lane[i]; }

  static EM_DEVICE Lanes excluded() {
    Lanes out;
    for (int i = 0; i < W; ++i) out.lane[i] = -INFINITY;
    return out;
  }
  static EM_DEVICE Lanes keep_larger(Lanes& held, const Lanes& x) {
    Lanes out;
    for (int i = 0; i < W; ++i) {
      out.lane[i] = smaller(held.lane[i], x.lane[i]);
      held.lane[i] = larger(held.lane[i], x.lane[i]);
    }
    return out;
  }
  EM_DEVICE T top() const {
    T out = lane[0];
    for (int i = 1; i < W; ++i) out = larger(out, lane[i]);
    return out;
  }
};

// Eight 16-bit numbers, in words of two.
template <class Half>
struct alignas(16) Pairs {
  using T = float;
  static constexpr int width = 8;
  uint32_t word[4];

  EM_DEVICE float get(int i) const {
    return i % 2 ? second_of(word[i / 2], Half{}) : first_of(word[i / 2], Half{});
  }
  static EM_DEVICE Pairs excluded() {
    const uint32_t pair = to_pair(-INFINITY, -INFINITY, Half{});
    return {{pair, pair, pair, pair}};
  }
  static EM_DEVICE Pairs keep_larger(Pairs& held, const Pairs& x) {
    Pairs out;
    for (int i = 0; i < 4; ++i) {
      out.word[i] = smaller_pair(held.word[i], x.word[i], Half{});
      held.word[i] = larger_pair(held.word[i], x.word[i], Half{});
    }
    return out;
  }
  EM_DEVICE float top() const {
    const uint32_t a = larger_pair(word[0], word[1], Half{});
    const uint32_t both = larger_pair(a, larger_pair(word[2], word[3], Half{}), Half{});
    return larger(first_of(both, Half{}), second_of(both, Half{}));
  }
};

template <class In>
struct Vectors {
  using Type = Pairs<In>;
};
template <>
struct Vectors<float> {
  using Type = Lanes<float, 4>;
};
template <>
struct Vectors<double> {
  using Type = Lanes<double, 2>;
};
template <class In>
using Vector = typename Vectors<In>::Type;

// What a loop over vectors does before a chunk where it has nothing to do.
struct Nothing {
  EM_DEVICE void operator()(int) const {}
};

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

template <class In>
EM_DEVICE Vector<In> as_vector(const uint32_t* word) {
  Vector<In> out;
  memcpy(&out, word, sizeof out);
  return out;
}

// How many numbers lie between the last multiple of 16 bytes and `x`, which is aligned to them.
template <class In>
EM_DEVICE int numbers_past(const In* x) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(In));
}

template <class In>
EM_DEVICE Vector<In> load_aligned(const In* x) {
  static_assert(sizeof(Vector<In>) == 16);
  return *reinterpret_cast<const Vector<In>*>(x);
}

// Where an aligned vector is loaded from: shared memory; global memory that the backward pass reads
// again, so that L2 may keep it; global memory for the last time. A vector that is not aligned is
// none of these: the 16 bytes around its ends are its neighbours' too, who find them in L1.
struct InShared {
  template <class In>
  EM_DEVICE Vector<In> operator()(const In* x) const {
    return load_aligned(x);
  }
};
template <bool kLast>
struct InGlobal {
  template <class In>
  EM_DEVICE Vector<In> operator()(const In* x) const {
    uint32_t word[4];
    if constexpr (kLast) {
      read_global_last(x, word);
    } else {
      read_global(x, word);
    }
    return as_vector<In>(word);
  }
};

// The aligned 16 bytes in which the vector at `x` begins; it ends in those behind.
template <class In>
EM_DEVICE const Bytes16* around(const In* x, int past) {
  return reinterpret_cast<const Bytes16*>(x - past);
}

// The 16 bytes that begin `past` numbers, which are `words` whole words, behind that of `low`.
template <class In>
EM_DEVICE Vector<In> between(Bytes16 low, Bytes16 high, int past, int words) {
  uint32_t from[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) from[i] = i < 4 ? low.word[i] : high.word[i - 4];
#pragma unroll
  for (int i = 0; i < 6; ++i) from[i] = words & 2 ? from[i + 2] : from[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) from[i] = words & 1 ? from[i + 1] : from[i];
  const int bits = sizeof(In) == 2 ? past % 2 * 16 : 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) from[i] = funnel(from[i], from[i + 1], bits);
  return as_vector<In>(from);
}

EM_DEVICE uint32_t pair_at(const bf16* x, bool first, bool second) {
  return (first ? x[0].bits : 0xff80u) | (second ? x[1].bits : 0xff80u) << 16;
}
EM_DEVICE uint32_t pair_at(const f16* x, bool first, bool second) {
  return (first ? x[0].bits : 0xfc00u) | (second ? x[1].bits : 0xfc00u) << 16;
}

// The vector at `x`, of which `count` numbers are there; the others are -inf.
template <class Half>
EM_DEVICE void load_numbers(const Half* x, int count, Pairs<Half>& out) {
  for (int i = 0; i < 4; ++i)
    out.word[i] = pair_at(x + 2 * i, 2 * i < count, 2 * i + 1 < count);
}
template <class T, int W>
EM_DEVICE void load_numbers(const T* x, int count, Lanes<T, W>& out) {
  for (int i = 0; i < W; ++i) out.lane[i] = i < count ? x[i] : T(-INFINITY);
}

// The vector at x + at of a row of n numbers, `past` numbers past a multiple of 16 bytes. What is
// behind the row is -inf, and nothing outside of it is read: number by number where the aligned 16
// bytes around a vector are not all the row's.
template <class In>
EM_DEVICE Vector<In> load_guarded(const In* x, int n, int past, int at) {
  constexpr int width = Vector<In>::width;
  const int reach = past ? 2 * width - past : width;
  if (past <= at && at <= n - reach) {
    const Bytes16* const two = around(x + at, past);
    return between<In>(two[0], two[past ? 1 : 0], past, past * int(sizeof(In)) / 4);
  }
  Vector<In> out;
  load_numbers(x + at, n - at, out);
  return out;
}

// The vectors at x + at[i], where x is `past` numbers past a multiple of 16 bytes, `words` whole
// words, and its numbers go on for a vector behind the last. Only at[0] may be 0: then v[0] is not
// loaded, for its first aligned 16 bytes are not all the row's.
template <class In, int N>
EM_DEVICE void load_between(
    const In* x, int past, int words, const int (&at)[N], Vector<In> (&v)[N]) {
  constexpr int width = Vector<In>::width;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int low = i == 0 && at[0] < width ? width : at[i];
    v[i] = between<In>(*around(x + low, past), around(x + at[i], past)[1], past, words);
  }
}

// The same of every `past`, and v[0] too. One branch for all threads tells what is constant, so
// that none has to select its words.
template <class In, int N>
EM_DEVICE void load_past(const In* x, int past, const int (&at)[N], Vector<In> (&v)[N]) {
  const int words = past * int(sizeof(In)) / 4;
  if (words == 0) {
    load_between(x, past, 0, at, v);
  } else if (words == 2 || sizeof(In) == 8) {
    load_between(x, past, 2, at, v);
  } else if (words == 1) {
    load_between(x, past, 1, at, v);
  } else {
    load_between(x, past, 3, at, v);
  }
  if (at[0] == 0) load_numbers(x, Vector<In>::width, v[0]);
}

EM_DEVICE float load_one(const float* x) { return *x; }
EM_DEVICE double load_one(const double* x) { return *x; }
template <class Half>
EM_DEVICE float load_one(const Half* x) {
  return first_of(x->bits, Half{});
}

EM_DEVICE void store_one(float value, float* to) { *to = value; }
EM_DEVICE void store_one(double value, double* to) { *to = value; }
template <class Half>
EM_DEVICE void store_one(float value, Half* to) {
  to->bits = static_cast<uint16_t>(to_pair(value, 0, Half{}));
}

// W numbers, or `count` of them, as numbers of type Out.
template <class T, int W>
EM_DEVICE void store_aligned(const Lanes<T, W>& x, T* to) {
  static_assert(sizeof(x) == 16);
  *reinterpret_cast<Lanes<T, W>*>(to) = x;
}
template <class Half>
EM_DEVICE void store_aligned(const Lanes<float, 8>& x, Half* to) {
  Bytes16 out;
  for (int i = 0; i < 4; ++i) out.word[i] = to_pair(x.lane[2 * i], x.lane[2 * i + 1], Half{});
  *reinterpret_cast<Bytes16*>(to) = out;
}
struct alignas(8) Bytes8 {
  uint32_t word[2];
};
template <class Half>
EM_DEVICE void store_narrow(const Lanes<float, 4>& x, Half* to) {
  *reinterpret_cast<Bytes8*>(to) = {
      {to_pair(x.lane[0], x.lane[1], Half{}), to_pair(x.lane[2], x.lane[3], Half{})}};
}
EM_DEVICE void store_aligned(const Lanes<float, 4>& x, bf16* to) { store_narrow(x, to); }
EM_DEVICE void store_aligned(const Lanes<float, 4>& x, f16* to) { store_narrow(x, to); }
template <class T, int W, class Out>
EM_DEVICE void store_guarded(const Lanes<T, W>& x, Out* to, int count) {
  if (count >= W) return store_aligned(x, to);
  for (int i = 0; i < W; ++i)
    if (i < count) store_one(x.lane[i], to + i);
}

// Zeros from `begin` to `end`, each thread every `step`-th 16 bytes from `first`; 16-bit steps at
// the ends.
EM_DEVICE void store_zeros(void* begin, void* end, int first, int step) {
  auto* from = static_cast<uint16_t*>(begin);
  auto* to = static_cast<uint16_t*>(end);
  const int64_t count = to - from;
  int64_t head = (16 - reinterpret_cast<uintptr_t>(from) % 16) % 16 / 2;
  if (head > count) head = count;
  const int64_t vectors = (count - head) / 8;
  for (int64_t i = first; i < head; i += step) from[i] = 0;
  for (int64_t i = first; i < vectors; i += step)
    reinterpret_cast<Bytes16*>(from + head)[i] = {{0, 0, 0, 0}};
  for (int64_t i = head + 8 * vectors + first; i < count; i += step) from[i] = 0;
}

}  // namespace em_kernels::cuda
