// csrc/cuda/device.h for a CPU: every thread of a cluster is a fiber. Between two barriers the
// fibers run one after the other in a random order fixed by the seed, one of them always last; a
// bulk copy lands only when it is waited for; shared memory is NaN before its block begins and
// after it has ended. So what a barrier or a wait is missing for shows.
//
// What does not show: the byte counts and phases of an mbarrier (a copy lands when it is waited for,
// whatever was announced); the order of memory within a phase (a thread sees at once what another
// has written, so `publish` does nothing here and a missing fence goes unseen); the order of the
// generic and the asynchronous proxy; what an earlier block has left in shared memory, where it
// passes for what should be there (here it is NaN); cache policies. For these the judge is
// compute-sanitizer (memcheck, racecheck, synccheck) on a GPU, which `make gpu` runs on the cases.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "../../csrc/cuda/kernels.h"

#define EM_DEVICE inline
#define EM_DEVICE_CALL
#define EM_KERNEL(threads, blocks) void
#define EM_PARAMETER(type) const type
#define EM_HAS_CLUSTERS 1

namespace em_kernels::cuda {

using std::exp;
using std::expm1;
using std::fabs;
using std::ilogb;
using std::ldexp;
using std::memcpy;
using std::tanh;

int thread_index();
int block_threads();
int64_t block_index();
unsigned char* shared_memory();
int cluster_rank();
int cluster_blocks();
int64_t cluster_index();

template <class T>
T multiply(T a, T b) {
  return a * b;
}
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
template <class T>
T at_least(T a, T b) {
  return std::fmax(a, b);
}
template <class T>
T larger(T a, T b) {
  return a > b || a != a ? a : b;
}
template <class T>
T smaller(T a, T b) {
  return std::fmin(a, b);
}
inline float power_of_2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}
inline double power_of_2(double x) { return std::exp2(x); }

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
float to_float(uint16_t bits, bf16);
float to_float(uint16_t bits, f16);
uint16_t to_bits(float x, bf16);
uint16_t to_bits(float x, f16);

template <class Half>
float first_of(uint32_t pair, Half) {
  return to_float(static_cast<uint16_t>(pair), Half{});
}
template <class Half>
float second_of(uint32_t pair, Half) {
  return to_float(static_cast<uint16_t>(pair >> 16), Half{});
}
template <class Half>
uint32_t to_pair(float first, float second, Half) {
  return to_bits(first, Half{}) | uint32_t(to_bits(second, Half{})) << 16;
}
template <class Half>
uint32_t larger_pair(uint32_t a, uint32_t b, Half h) {
  return to_pair(
      larger(first_of(a, h), first_of(b, h)), larger(second_of(a, h), second_of(b, h)), h);
}
template <class Half>
uint32_t smaller_pair(uint32_t a, uint32_t b, Half h) {
  return to_pair(
      smaller(first_of(a, h), first_of(b, h)), smaller(second_of(a, h), second_of(b, h)), h);
}

inline uint32_t funnel(uint32_t low, uint32_t high, int bits) {
  return static_cast<uint32_t>((uint64_t(high) << 32 | low) >> bits);
}

void read_global(const void* from, uint32_t (&to)[4]);
inline void read_global_last(const void* from, uint32_t (&to)[4]) { read_global(from, to); }

void sync_block();
void cluster_arrive();
void cluster_wait();
inline void publish() {}

// What each lane of the warp passed, of 8 bytes at most.
using Slots = unsigned char[32][8];
const Slots& exchange(const void* value, size_t bytes);

template <class T>
T of_lane(T value, int lane) {
  std::memcpy(&value, exchange(&value, sizeof(T))[lane], sizeof(T));
  return value;
}
// This thread's own at the end of the warp.
template <class T>
T shuffle_down(T value, int lanes) {
  const int lane = thread_index() % 32;
  return of_lane(value, lane + lanes < 32 ? lane + lanes : lane);
}
template <class T>
T shuffle_xor(T value, int lanes) {
  return of_lane(value, thread_index() % 32 ^ lanes);
}
inline void sync_warp() { of_lane(0, 0); }
inline int first_lane(bool x) {
  const Slots& slots = exchange(&x, sizeof(x));
  for (int lane = 0; lane < 32; ++lane)
    if (slots[lane][0]) return lane;
  return -1;
}
inline float largest_of_warp(float x) {
  for (int lanes = 1; lanes < 32; lanes *= 2) x = larger(x, shuffle_xor(x, lanes));
  return x;
}

const void* peer_address(const void* own, int rank);

template <class T>
const T* of_peer(const T* own, int rank) {
  return static_cast<const T*>(peer_address(own, rank));
}

// The copies that have been started on it and have not landed.
struct Arrival {
  uint32_t number;
};
void init_arrivals(Arrival* arrivals, int count);
void start_copy(void* to, const void* from, uint32_t bytes, Arrival* arrival);
void wait_copy(Arrival* arrival);

// Runs the kernel over the whole grid, cluster by cluster, in an order drawn from the seed. Throws
// std::runtime_error where threads wait for each other without end.
void run_grid(const Plan& plan, uintptr_t seed, const std::function<void()>& thread);

// The stream is the seed.
template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...), const Plan& plan, void* stream, const Arguments&... arguments) {
  run_grid(plan, reinterpret_cast<uintptr_t>(stream), [&] { kernel(arguments...); });
}

}  // namespace em_kernels::cuda
