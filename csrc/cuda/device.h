// What the kernels ask of the hardware, a function each. The emulator of the tests provides the
// same functions for a CPU, so the kernels above them have one source.
#pragma once

#if defined(EM_EMULATED)
#include "emulated_device.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

#define EM_DEVICE __device__ __forceinline__
#define EM_DEVICE_CALL __device__ __noinline__
#define EM_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// One that is indexed: it stays where the launch has put it, and no thread makes itself a copy.
#define EM_PARAMETER(type) const __grid_constant__ type

namespace em_kernels::cuda {

// Where a thread is.

EM_DEVICE int thread_index() { return threadIdx.x; }
EM_DEVICE int block_threads() { return blockDim.x; }
EM_DEVICE int64_t block_index() { return blockIdx.x; }

EM_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char em_shared[];
  return em_shared;
}

// Arithmetic, each one instruction in float32. `multiply` is never fused with a later sum;
// -fmad=false sees to the rest, where fusing in one kernel and not in another would make their bits
// differ.

EM_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
EM_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }

EM_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
EM_DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

// The larger, `b` if `a` is NaN.
EM_DEVICE float at_least(float a, float b) { return fmaxf(a, b); }
EM_DEVICE double at_least(double a, double b) { return fmax(a, b); }

// NaN if either is.
EM_DEVICE float larger(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
EM_DEVICE double larger(double a, double b) { return a > b || a != a ? a : b; }

EM_DEVICE float smaller(float a, float b) { return fminf(a, b); }
EM_DEVICE double smaller(double a, double b) { return fmin(a, b); }

// 2^x, in float32 to 2 ulp, and 0 where it is below the normal numbers.
EM_DEVICE float power_of_2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
EM_DEVICE double power_of_2(double x) { return exp2(x); }

// Two 16-bit numbers in a word, the first in the low half. larger_pair is NaN where either is.

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

EM_DEVICE uint32_t larger_pair(uint32_t a, uint32_t b, bf16) {
  asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
EM_DEVICE uint32_t larger_pair(uint32_t a, uint32_t b, f16) {
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
EM_DEVICE uint32_t smaller_pair(uint32_t a, uint32_t b, bf16) {
  asm("min.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
EM_DEVICE uint32_t smaller_pair(uint32_t a, uint32_t b, f16) {
  asm("min.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

EM_DEVICE float first_of(uint32_t pair, bf16) { return __uint_as_float(pair << 16); }
EM_DEVICE float second_of(uint32_t pair, bf16) { return __uint_as_float(pair & 0xffff0000u); }
EM_DEVICE float first_of(uint32_t pair, f16) {
  float out;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(out) : "r"(pair));
  return out;
}
EM_DEVICE float second_of(uint32_t pair, f16) {
  float out;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(out) : "r"(pair));
  return out;
}

EM_DEVICE uint32_t to_pair(float first, float second, bf16) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
  return out;
}
EM_DEVICE uint32_t to_pair(float first, float second, f16) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
  return out;
}

// 32 bits of the 64 in `low` and `high`, from bit `bits` on.
EM_DEVICE uint32_t funnel(uint32_t low, uint32_t high, int bits) {
  return __funnelshift_r(low, high, bits);
}

// Sixteen aligned bytes of global memory that no other thread reads: they take no place in L1.
EM_DEVICE void read_global(const void* from, uint32_t (&to)[4]) {
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(__cvta_generic_to_global(from))
               : "memory");
}

// What nobody reads again is the first to leave the L2 cache, so that it drives out nothing of use.
EM_DEVICE uint64_t never_again() {
  uint64_t out;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(out));
  return out;
}

// `read_global` of bytes that nobody reads again.
EM_DEVICE void read_global_last(const void* from, uint32_t (&to)[4]) {
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(__cvta_generic_to_global(from)), "l"(never_again())
               : "memory");
}

// Threads of a warp and of a block. All of a warp must come.

constexpr unsigned kAllLanes = 0xffffffffu;

EM_DEVICE void sync_block() { __syncthreads(); }
EM_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
EM_DEVICE T shuffle_down(T value, int lanes) {
  return __shfl_down_sync(kAllLanes, value, lanes);
}
template <class T>
EM_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(kAllLanes, value, lanes);
}

// The first lane where it is true; -1 if there is none.
EM_DEVICE int first_lane(bool x) { return __ffs(__ballot_sync(kAllLanes, x)) - 1; }

// In all lanes: the largest, NaN if any is. As integers, whose order is that of the numbers once
// the bits of the negative ones are turned round; max.NaN leaves one NaN, above all numbers.
EM_DEVICE float largest_of_warp(float x) {
  const int bits = __float_as_int(larger(x, x));
  const int out = __reduce_max_sync(kAllLanes, bits ^ (bits >> 31 & 0x7fffffff));
  return __int_as_float(out ^ (out >> 31 & 0x7fffffff));
}

// Blocks of a cluster (compute capability 9.0).

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define EM_HAS_CLUSTERS 1

EM_DEVICE int cluster_rank() {
  int out;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(out));
  return out;
}
EM_DEVICE int cluster_blocks() {
  int out;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(out));
  return out;
}
EM_DEVICE int64_t cluster_index() {
  unsigned out;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(out));
  return out;
}
// Nobody is past `wait` before every thread of the cluster has arrived. Arriving publishes nothing:
// `publish` does, for the thread that calls it and for all that it knows of by a barrier of the
// block. It waits for memory, so one thread of a block calls it, not all.
EM_DEVICE void publish() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }
EM_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
EM_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Where block `rank` of the cluster has what is at `own` in this block's shared memory.
template <class T>
EM_DEVICE const T* of_peer(const T* own, int rank) {
  uint64_t out;
  asm("mapa.u64 %0, %1, %2;" : "=l"(out) : "l"(reinterpret_cast<uint64_t>(own)), "r"(rank));
  return reinterpret_cast<const T*>(out);
}

// A bulk copy from global to shared memory: 16-byte aligned both, a multiple of 16 bytes. One
// thread starts it on an arrival in shared memory; whoever reads the copy waits for that first.
struct Arrival {
  uint64_t state;
};

EM_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

EM_DEVICE void init_arrivals(Arrival* arrivals, int count) {
  for (int i = 0; i < count; ++i)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrivals + i))
                 : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

EM_DEVICE void start_copy(void* to, const void* from, uint32_t bytes, Arrival* arrival) {
  const uint32_t barrier = shared_address(arrival);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
  if (bytes == 0) return;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;"
      :
      : "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier),
        "l"(never_again())
      : "memory");
}

EM_DEVICE void wait_copy(Arrival* arrival) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;}" ::"r"(shared_address(arrival))
      : "memory");
}
#endif

}  // namespace em_kernels::cuda

#endif
