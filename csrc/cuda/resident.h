// The sums of a row that lies in the shared memory of a cluster: the block's maximum first, then
// plain sums relative to it, so that only the blocks of the cluster have to be re-based on each
// other.
#pragma once

#include "rows.h"

namespace em_kernels::cuda {

#if defined(EM_HAS_CLUSTERS)

// The sums of a block's numbers, relative to the largest of them and without it, in units of log2.
template <class T>
struct alignas(16) HeldSums {
  T max, r, q;
};

template <class T>
struct ResidentScratch {
  T max[kMaxThreads / 32];
  T r[kMaxThreads / 32], q[kMaxThreads / 32];
  HeldSums<T> sums;
  Saved<T> saved;
  Arrival arrivals[kMaxChunks];
};

// The number of vectors that hold n numbers; the last is filled up with -inf.
template <class In>
EM_DEVICE int pad_held(In* held, int n) {
  constexpr int width = Vector<In>::width;
  const int vectors = (n + width - 1) / width, at = n + thread_index();
  if (at < vectors * width) store_one(Real<In>(-INFINITY), held + at);
  return vectors;
}

// Calls body(x) for this thread's vectors of those in shared memory; before(k) comes before those
// of chunk k, which has kLoads a thread. Which thread has which does not depend on how `held` is
// aligned.
template <class In, class Before, class Body>
EM_DEVICE void for_each_held(
    const In* held, int vectors, const Before& before, const Body& body) {
  constexpr int width = Vector<In>::width;
  const int step = block_threads(), chunk = kLoads * step, past = numbers_past(held);
  int v = thread_index(), k = 0;
  Vector<In> x[kLoads];
  for (; past == 0 && (k + 1) * chunk <= vectors; ++k, v += chunk) {
    before(k);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) x[i] = load_aligned(held + (v + i * step) * width);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) body(x[i]);
  }
  for (; (k + 1) * chunk < vectors; ++k, v += chunk) {
    before(k);
    int at[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) at[i] = (v + i * step) * width;
    load_past(held, past, at, x);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) body(x[i]);
  }
  if (k * chunk < vectors) before(k);
#pragma unroll 1
  for (; v < vectors; v += step)
    body(
        past == 0 ? load_aligned(held + v * width)
                  : load_guarded(held, vectors * width, past, v * width));
}

// A number equal to `top` is taken out of shared memory and later put back: one of the maxima that
// thread `owner` of the block has. By a warp.
template <class In>
struct Taken {
  In number;
  int at = -1;

  EM_DEVICE void take(In* held, int vectors, int owner, Real<In> top) {
    constexpr int width = Vector<In>::width;
    const int lane = thread_index() % 32, step = block_threads();
    int found = -1;
    for (int i = lane; found < 0 && (i - lane) / width * step + owner < vectors; i += 32) {
      const int v = i / width * step + owner, index = v * width + i % width;
      const bool is_top = v < vectors && load_one(held + index) == top;
      found = first_lane(is_top);
      if (lane == found) at = index;
    }
    if (at < 0) return;
    number = held[at];
    store_one(Real<In>(-INFINITY), held + at);
  }
  EM_DEVICE void put_back(In* held) const {
    if (at >= 0) held[at] = number;
  }
};

// In all lanes: the sum over each `kLanes` of them, the same bits in each.
template <int kLanes, class T>
EM_DEVICE T sum_lanes(T x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}

// Into scratch.sums: those of the block, whose numbers have arrived when their maximum is known.
// scratch.max, r and q are by warp.
template <class In, class T>
EM_DEVICE void sum_up_held(
    In* held, int vectors, const Scaling<T>& by, ResidentScratch<T>& scratch) {
  using V = Vector<In>;
  constexpr int most = kMaxThreads / 32;
  const int warp = thread_index() / 32, lane = thread_index() % 32, warps = block_threads() / 32;
  V own = V::excluded();
  const auto arrived = [&](int k) { wait_copy(scratch.arrivals + k); };
  for_each_held(held, vectors, arrived, [&](const V& x) { V::keep_larger(own, x); });
  const T of_thread = own.top(), of_warp = largest_of_warp(of_thread);
  if (lane == 0) scratch.max[warp] = of_warp;
  sync_block();
  const T each = lane < warps ? scratch.max[lane] : -INFINITY, top = largest_of_warp(each);
  Taken<In> taken;
  if (warp == first_lane(each == top))
    taken.take(held, vectors, 32 * warp + first_lane(of_thread == top), top);
  sync_warp();
  T r = 0, q = 0;
  for_each_held(held, vectors, Nothing(), [&](const V& x) {
#pragma unroll
    for (int i = 0; i < V::width; ++i) {
      const T d = by.distance(x.get(i), top), e = power_of_2(d);
      r += e;
      q = multiply_add(e, d, q);
    }
  });
  r = sum_lanes<32>(r);
  q = sum_lanes<32>(q);
  if (lane == 0) {
    scratch.r[warp] = r;
    scratch.q[warp] = q;
  }
  sync_block();
  taken.put_back(held);
  if (warp > 0) return;
  r = sum_lanes<most>(lane < warps ? scratch.r[lane] : 0);
  q = sum_lanes<most>(lane < warps ? scratch.q[lane] : 0);
  if (lane == 0) scratch.sums = {top, r, q};
}

// By a warp, in all its lanes: the row's sums, those of d in units of z, lane i having read those of block i.
// The first block that has the maximum leads; the others bring theirs in.
template <class T>
EM_DEVICE Part<T> merge_cluster(
    const HeldSums<T>& own, int blocks, int lane, const Scaling<T>& by) {
  HeldSums<T> x = {-INFINITY, 0, 0};
  if (lane < blocks) x = *of_peer(&own, lane);
  const T top = largest_of_warp(x.max);
  const T delta = by.distance(x.max, top), e = power_of_2(delta);
  const T r = x.r + (lane == first_lane(x.max == top) ? 0 : 1);
  Part<T> out;
  out.softmax.max = top;
  out.softmax.r = sum_lanes<32>(multiply(e, r));
  const T q = sum_lanes<32>(multiply(e, multiply_add(delta, r, x.q)));
  out.softmax.q = multiply(q, Scaling<T>::kLn2);
  return out;
}

#endif

}  // namespace em_kernels::cuda
