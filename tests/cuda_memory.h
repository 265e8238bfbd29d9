// The device's memory, and the numbers of every dtype in it, for the cases of cuda_cases.cpp.
#pragma once

#if !defined(EM_EMULATED)
#include <cuda_runtime_api.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../csrc/cuda/kernels.h"

namespace cases {

using namespace em_kernels;
using namespace em_kernels::cuda;

#if defined(EM_EMULATED)
inline void* allocate(size_t bytes) { return std::malloc(bytes); }
inline void release(void* memory) { std::free(memory); }
inline void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

// What a launch of case EM_REFUSED, and any call after it in case EM_LOST, does on a GPU.
inline int64_t running = 0;
inline int64_t setting(const char* name) {
  return std::getenv(name) ? std::atoll(std::getenv(name)) : -1;
}
inline bool lost() { return setting("EM_LOST") >= 0 && running >= setting("EM_LOST"); }
inline void wait() {
  if (running == setting("EM_REFUSED")) throw std::runtime_error("the launch was refused");
  if (lost()) throw std::runtime_error("an illegal memory access was encountered");
}
#else
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes));
  return memory;
}
inline void release(void* memory) { cudaFree(memory); }
inline void copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
inline void wait() {
  check(cudaGetLastError());
  check(cudaDeviceSynchronize());
}
// A refused launch leaves an error that is told once; one that is told again is there to stay.
inline bool lost() {
  cudaGetLastError();
  return cudaDeviceSynchronize() != cudaSuccess;
}
#endif

// The nearest bfloat16 and back, by its bits.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// An entry of a tensor of `dtype`, on the host.
inline double load(const std::vector<char>& bytes, DType dtype, int64_t index) {
  const char* at = bytes.data() + index * size_of(dtype);
  const auto as = [&](auto value) {
    std::memcpy(&value, at, sizeof value);
    return value;
  };
  switch (dtype) {
    case DType::f32: return as(float());
    case DType::bf16: return from_bf16(as(uint16_t()));
    case DType::f16: return as(_Float16());
    default: return as(double());
  }
}

inline void store(std::vector<char>& bytes, DType dtype, int64_t index, double value) {
  char* at = bytes.data() + index * size_of(dtype);
  const auto put = [&](auto x) { std::memcpy(at, &x, sizeof x); };
  switch (dtype) {
    case DType::f32: return put(float(value));
    case DType::bf16: return put(to_bf16(float(value)));
    case DType::f16: return put(_Float16(value));
    default: return put(value);
  }
}

// The spacing of numbers of `dtype` near 1.
inline double epsilon(DType dtype) {
  switch (dtype) {
    case DType::f32: return std::ldexp(1, -23);
    case DType::bf16: return std::ldexp(1, -7);
    case DType::f16: return std::ldexp(1, -10);
    default: return std::ldexp(1, -52);
  }
}

// Memory on the device that holds a copy of a host vector.
class Memory {
 public:
  explicit Memory(std::vector<char> bytes) : host(std::move(bytes)) {
    device_ = allocate(std::max<size_t>(host.size(), 1));
    copy(device_, host.data(), host.size());
  }
  Memory(const Memory&) = delete;
  ~Memory() { release(device_); }
  void* get() const { return device_; }
  void fetch() { copy(host.data(), device_, host.size()); }

  std::vector<char> host;

 private:
  void* device_ = nullptr;
};

inline DType real(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

template <class Values>
std::vector<char> bytes_of(DType dtype, const Values& values) {
  std::vector<char> bytes(values.size() * size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) store(bytes, dtype, i, values[i]);
  return bytes;
}

// A number as a tensor of `dtype` holds it.
inline double rounded_to(DType dtype, double value) {
  std::vector<char> bytes(8);
  store(bytes, dtype, 0, value);
  return load(bytes, dtype, 0);
}

}  // namespace cases
