// The running sums of one thread over its share of a row, and their merge over a block.
//
// A vector has `width` lanes. A lane holds the largest number it has seen back; every number is
// compared with it once and the smaller of the two joins the sums. So the maximum is never in the
// sums, a tie counts once, and no term has to be looked at twice. Terms are taken relative to the
// largest number held by the thread, and the sums are re-based once per chunk.
#pragma once

#include "sizes.h"
#include "vectors.h"

namespace em_kernels::cuda {

// In units of the numbers that are summed: exp(z - z') = 2^((x - x') to_log2); 0 below `floor`.
template <class T>
struct Scaling {
  T to_z, to_log2, floor;

  explicit EM_DEVICE Scaling(T z_per_x) : to_z(z_per_x), to_log2(z_per_x * T(1.4426950408889634)) {
    // 0 times the floor must not be NaN.
    floor = at_least(T(sizeof(T) == 4 ? -200 : -1500) / to_log2, T(-1e37));
  }
  EM_DEVICE T distance(T x, T from) const { return at_least(x - from, floor); }
  EM_DEVICE T exponential(T d) const { return power_of_2(d * to_log2); }
};

// What is summed up besides the sums of exponentials.
struct Extras {
  bool moments = false, argmax = false;
};

// Sums of powers of z - shift over the numbers above -inf, the first of which is the shift.
template <class T>
struct PowerSums {
  T shift = 0, count = 0, s1 = 0, s2 = 0, s3 = 0;

  EM_DEVICE void add(T x) {
    if (x == -INFINITY) return;
    if (count == 0) shift = x;
    const T away = x - shift;
    count += 1;
    s1 += away;
    s2 = multiply_add(away, away, s2);
    s3 = multiply_add(away * away, away, s3);
  }
  EM_DEVICE LogitMoments<T> moments(T scale) const {
    LogitMoments<T> out;
    if (count == 0) return out;
    const T offset = s1 / count;
    out.count = count;
    out.mean = scale * (shift + offset);
    out.m2 = scale * scale * at_least(s2 - offset * s1, T(0));
    out.m3 = scale * scale * scale * (s3 - offset * (3 * s2 - 2 * offset * s1));
    return out;
  }
};

template <class T>
struct Part {
  SoftmaxMoments<T> softmax;
  LogitMoments<T> logits;
};

template <class V, bool kExtras>
struct Sums {
  using T = typename V::T;
  V held;
  T max, r = 0, q = 0;
  T s = 0, c = 0, t = 0;
  PowerSums<T> powers;
  int index[V::width];

  // Of `first`, whose first number has index `at` in the row.
  EM_DEVICE Sums(const V& first, int at, const Extras& extras) : held(first), max(first.top()) {
    for (int i = 0; i < V::width; ++i) {
      index[i] = at + i;
      if (kExtras && extras.moments) powers.add(first.get(i));
    }
  }

  // `at[k]` is the index in the row of the first number of x[k].
  template <int N>
  EM_DEVICE void add(V (&x)[N], const int (&at)[N], const Scaling<T>& by, const Extras& extras) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (kExtras) note(x[k], at[k], extras);
      x[k] = V::keep_larger(held, x[k]);
    }
    rebase(held.top(), by);
#pragma unroll
    for (int k = 0; k < N; ++k)
#pragma unroll
      for (int i = 0; i < V::width; ++i) add_one(x[k].get(i), by);
  }

  EM_DEVICE void note(const V& x, int at, const Extras& extras) {
    for (int i = 0; i < V::width; ++i) {
      if (extras.argmax && x.get(i) > held.get(i)) index[i] = at + i;
      if (extras.moments) powers.add(x.get(i));
    }
  }

  EM_DEVICE void rebase(T top, const Scaling<T>& by) {
    const T delta = by.distance(max, top);
    const T e = by.exponential(delta);
    if (kExtras) {
      s = e * (s + delta * (2 * q + delta * r));
      t = e * e * (t + delta * c);
      c = e * e * c;
    }
    q = multiply(e, multiply_add(delta, r, q));
    r = multiply(e, r);
    max = top;
  }

  EM_DEVICE void add_one(T x, const Scaling<T>& by) {
    const T d = by.distance(x, max);
    const T e = by.exponential(d);
    r += e;
    q = multiply_add(e, d, q);
    if (kExtras) {
      s = multiply_add(e * d, d, s);
      c = multiply_add(e, e, c);
      t = multiply_add(e * e, d, t);
    }
  }

  // All lanes together, in units of z.
  EM_DEVICE Part<T> total(const Scaling<T>& by) {
    T top = held.get(0);
    int argmax = index[0];
    for (int i = 1; i < V::width; ++i) {
      const T x = held.get(i);
      if (kExtras && (x > top || (x == top && index[i] < argmax))) argmax = index[i];
      add_one(smaller(top, x), by);
      top = larger(top, x);
    }
    const T z = by.to_z;
    Part<T> out;
    out.softmax = {multiply(max, z), kExtras ? argmax : -1, r, multiply(q, z), s * z * z, c, t * z};
    if (kExtras) out.logits = powers.moments(z);
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
    out.softmax.c = move(part.softmax.c);
    out.softmax.t = move(part.softmax.t);
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
EM_DEVICE Part<T> merge_parts(const Part<T>& x, const Part<T>& y) {
  Part<T> out;
  out.softmax = merge(x.softmax, y.softmax);
  if (kExtras) out.logits = merge(x.logits, y.logits);
  return out;
}

// `part`, or what is at `own` and `part` joined, into `own`.
template <bool kExtras, class T>
EM_DEVICE void join_own(const Part<T>& part, bool first, T* own) {
  put_part<kExtras>(first ? part : merge_parts<kExtras>(get_part<kExtras>(own), part), own);
}

// In a cluster whose blocks have one part of a row each: joins what the threads of the others have
// at `own` to what those of block 0 have there, and tells whether this is block 0.
template <bool kExtras, class T>
EM_DEVICE bool join_blocks(T* own, int rank, int parts) {
#if defined(EM_HAS_CLUSTERS)
  sync_block();
  if (thread_index() == 0) publish();
  cluster_arrive();
  cluster_wait();
  for (int peer = 1; rank == 0 && peer < parts; ++peer)
    join_own<kExtras>(get_part<kExtras>(of_peer(own, peer)), false, own);
  cluster_arrive();
  cluster_wait();  // block 0 may still be reading this block's shared memory
#endif
  return rank == 0;
}

// In lane 0: the parts of the 32 lanes, the lower lane always on the left.
template <bool kExtras, class T>
EM_DEVICE Part<T> merge_warp(Part<T> part) {
#pragma unroll 1
  for (int lanes = 1; lanes < 32; lanes *= 2)
    part = merge_parts<kExtras>(part, shuffle_part<kExtras>(part, lanes));
  return part;
}

template <class T>
struct BlockScratch {
  Part<T> warp[kMaxThreads / 32];
};

// In all threads of the first warp: the parts of all threads of the block. `scratch` is in shared
// memory.
template <bool kExtras, class T>
EM_DEVICE Part<T> merge_block(Part<T> part, BlockScratch<T>& scratch) {
  const int thread = thread_index();
  part = merge_warp<kExtras>(part);
  if (thread % 32 == 0) scratch.warp[thread / 32] = part;
  sync_block();
  if (thread >= 32) return part;
  part = Part<T>();
  if (thread < block_threads() / 32) part = scratch.warp[thread];
  part = merge_warp<kExtras>(part);
  if (thread == 0) scratch.warp[0] = part;
  sync_warp();
  return scratch.warp[0];
}

}  // namespace em_kernels::cuda
