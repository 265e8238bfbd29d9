// The running sums of one thread over its share of a row, and their merge over a block.
//
// A vector has `width` lanes. A lane holds the largest number it has seen back; every number is
// compared with it once and the smaller of the two joins the sums. So the maximum is never in the
// sums, a tie counts once, and no term has to be looked at twice. Terms are taken relative to the
// largest number held by the thread, and the sums are re-based once per chunk.
#pragma once

#include <limits>

#include "logit_moments.h"
#include "sizes.h"
#include "vectors.h"

namespace em_kernels::cuda {

// How far apart numbers u are, in units of z and in those of log2: exp(c (u - u')) = 2^distance.
// The difference comes first, and one product follows.
template <class T>
struct Scaling {
  static constexpr T kFloor = sizeof(T) == 4 ? -200 : -1500;  // 2 to it is 0, and 0 times it too
  static constexpr T kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

  T c, to_log2;

  explicit EM_DEVICE Scaling(T factor)
      : c(factor), to_log2(smaller(factor * kLog2E, std::numeric_limits<T>::max())) {}
  EM_DEVICE T apart(T u, T from) const { return multiply(u - from, c); }
  EM_DEVICE T distance(T u, T from) const { return at_least(multiply(u - from, to_log2), kFloor); }
};

// What is summed up besides the sums of exponentials.
struct Extras {
  bool moments = false, argmax = false;
};

template <class T>
struct Part {
  SoftmaxMoments<T> softmax;
  CentredSums<T> logits;
};

template <class V, bool kExtras>
struct Sums {
  using T = typename V::T;
  V held;
  T max, r = 0, q = 0;
  T s = 0, c2 = 0, t = 0;
  PowerSums<T> powers;
  int index[V::width];

  // Of `first`, whose first number has index `at` in the row.
  EM_DEVICE Sums(const V& first, int at, const Extras& extras) : held(first), max(first.top()) {
    for (int i = 0; i < V::width; ++i) index[i] = at + i;
    if (kExtras && extras.moments) {
      const V only[1] = {first};
      powers.add(only);
    }
  }

  // `at[k]` is the index in the row of the first number of x[k].
  template <int N>
  EM_DEVICE void add(V (&x)[N], const int (&at)[N], const Scaling<T>& by, const Extras& extras) {
    if (kExtras && extras.moments) powers.add(x);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (kExtras && extras.argmax) note(x[k], at[k]);
      x[k] = V::keep_larger(held, x[k]);
    }
    rebase(held.top(), by);
#pragma unroll
    for (int k = 0; k < N; ++k)
#pragma unroll
      for (int i = 0; i < V::width; ++i) add_one(x[k].get(i), by);
  }

  EM_DEVICE void note(const V& x, int at) {
    for (int i = 0; i < V::width; ++i)
      if (x.get(i) > held.get(i)) index[i] = at + i;
  }

  EM_DEVICE void rebase(T top, const Scaling<T>& by) {
    const T delta = by.distance(max, top);
    const T e = power_of_2(delta);
    if (kExtras) {
      s = e * (s + delta * (2 * q + delta * r));
      t = e * e * (t + delta * c2);
      c2 = e * e * c2;
    }
    q = multiply(e, multiply_add(delta, r, q));
    r = multiply(e, r);
    max = top;
  }

  EM_DEVICE void add_one(T x, const Scaling<T>& by) {
    const T d = by.distance(x, max);
    const T e = power_of_2(d);
    r += e;
    q = multiply_add(e, d, q);
    if (kExtras) {
      s = multiply_add(e * d, d, s);
      c2 = multiply_add(e, e, c2);
      t = multiply_add(e * e, d, t);
    }
  }

  // All lanes together, the sums of d in units of z.
  EM_DEVICE Part<T> total(const Scaling<T>& by) {
    T top = held.get(0);
    int argmax = index[0];
    for (int i = 1; i < V::width; ++i) {
      const T x = held.get(i);
      if (kExtras && (x > top || (x == top && index[i] < argmax))) argmax = index[i];
      add_one(smaller(top, x), by);
      top = larger(top, x);
    }
    constexpr T z = Scaling<T>::kLn2;
    Part<T> out;
    out.softmax = {max, kExtras ? argmax : -1, r, multiply(q, z), s * (z * z), c2, t * z};
    if (kExtras) out.logits = powers.centred();
    return out;
  }
};

// A Part whose fields are move(those of `part`): kSums of them, or kAllSums.
template <bool kExtras, class T, class Move>
EM_DEVICE Part<T> move_part(const Part<T>& part, const Move& move) {
  Part<T> out;
  out.softmax.max = move(part.softmax.max);
  out.softmax.r = move(part.softmax.r);
  out.softmax.q = move(part.softmax.q);
  if (kExtras) {
    out.softmax.argmax = move(static_cast<int>(part.softmax.argmax));
    out.softmax.s = move(part.softmax.s);
    out.softmax.c2 = move(part.softmax.c2);
    out.softmax.t = move(part.softmax.t);
    out.logits.shift = move(part.logits.shift);
    out.logits.unit = move(part.logits.unit);
    out.logits.count = move(part.logits.count);
    out.logits.mean = move(part.logits.mean);
    out.logits.m2 = move(part.logits.m2);
    out.logits.m3 = move(part.logits.m3);
  }
  return out;
}

// `part` of the thread `lanes` further on.
template <bool kExtras, class T>
EM_DEVICE Part<T> shuffle_part(const Part<T>& part, int lanes) {
  return move_part<kExtras>(part, [&](auto field) { return shuffle_down(field, lanes); });
}

// A Part of every thread of a block, in shared memory, field by field. `own` is the first field of
// this thread's.
template <bool kExtras, class T>
EM_DEVICE void put_part(const Part<T>& part, T* own) {
  move_part<kExtras>(part, [&](auto field) {
    *reinterpret_cast<decltype(field)*>(own) = field;
    own += block_threads();
    return field;
  });
}
template <bool kExtras, class T>
EM_DEVICE Part<T> get_part(const T* own) {
  return move_part<kExtras>(Part<T>(), [&](auto field) {
    field = *reinterpret_cast<const decltype(field)*>(own);
    own += block_threads();
    return field;
  });
}

template <bool kExtras, class T>
EM_DEVICE Part<T> merge_parts(const Part<T>& x, const Part<T>& y, T c) {
  Part<T> out;
  out.softmax = merge(x.softmax, y.softmax, c);
  if (kExtras) out.logits = merge(x.logits, y.logits);
  return out;
}

// `part`, or what is at `own` and `part` joined, into `own`.
template <bool kExtras, class T>
EM_DEVICE void join_own(const Part<T>& part, bool first, T* own, T c) {
  put_part<kExtras>(first ? part : merge_parts<kExtras>(get_part<kExtras>(own), part, c), own);
}

// In a cluster whose blocks have one part of a row each: joins what the threads of the others have
// at `own` to what those of block 0 have there, and tells whether this is block 0.
template <bool kExtras, class T>
EM_DEVICE bool join_blocks(T* own, int rank, int parts, T c) {
#if defined(EM_HAS_CLUSTERS)
  sync_block();
  if (thread_index() == 0) publish();
  cluster_arrive();
  cluster_wait();
  for (int peer = 1; rank == 0 && peer < parts; ++peer)
    join_own<kExtras>(get_part<kExtras>(of_peer(own, peer)), false, own, c);
  cluster_arrive();
  cluster_wait();  // block 0 may still be reading this block's shared memory
#endif
  return rank == 0;
}

// In lane 0: the parts of the 32 lanes, the lower lane always on the left.
template <bool kExtras, class T>
EM_DEVICE Part<T> merge_warp(Part<T> part, T c) {
#pragma unroll 1
  for (int lanes = 1; lanes < 32; lanes *= 2)
    part = merge_parts<kExtras>(part, shuffle_part<kExtras>(part, lanes), c);
  return part;
}

template <class T>
struct BlockScratch {
  Part<T> warp[kMaxThreads / 32];
};

// In all threads of the first warp: the parts of all threads of the block. `scratch` is in shared
// memory.
template <bool kExtras, class T>
EM_DEVICE Part<T> merge_block(Part<T> part, BlockScratch<T>& scratch, T c) {
  const int thread = thread_index();
  part = merge_warp<kExtras>(part, c);
  if (thread % 32 == 0) scratch.warp[thread / 32] = part;
  sync_block();
  if (thread >= 32) return part;
  part = Part<T>();
  if (thread < block_threads() / 32) part = scratch.warp[thread];
  part = merge_warp<kExtras>(part, c);
  if (thread == 0) scratch.warp[0] = part;
  sync_warp();
  return scratch.warp[0];
}

}  // namespace em_kernels::cuda
