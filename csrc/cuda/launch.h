// Loading and launching kernels: host code that needs CUDA's runtime but no nvcc.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "sizes.h"

namespace em_kernels::cuda {

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(
      std::string(call) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// How the blocks of a launch are grouped, as an attribute of it.
inline cudaLaunchAttribute in_clusters_of(int blocks) {
  cudaLaunchAttribute out = {};
  out.id = cudaLaunchAttributeClusterDimension;
  out.val.clusterDim.x = static_cast<unsigned>(blocks);
  out.val.clusterDim.y = out.val.clusterDim.z = 1;
  return out;
}

// The most blocks of `shared_bytes` each, a power of 2 up to kMaxCluster, that the current device
// runs as one cluster of `kernel`; 0 where it runs none. A part of a GPU may have too few
// multiprocessors side by side.
inline int largest_cluster(const void* kernel, int shared_bytes) {
  for (int blocks = kMaxCluster; blocks >= 1; blocks /= 2) {
    cudaLaunchAttribute cluster = in_clusters_of(blocks);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kMaxThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error == cudaSuccess && clusters > 0) return blocks;
    if (error != cudaSuccess) cudaGetLastError();  // it is the answer, and not to be met later
  }
  return 0;
}

// Loads the kernels for the current device, once for all launches on it: `streaming` ones, and
// `resident` ones, whose blocks may have `shared_bytes` each and run in clusters. Each kernel's
// ptxVersion is what its code was written for: less than the device's compute capability where the
// driver made it out of older PTX.
inline Loaded load(
    const std::vector<const void*>& streaming, const std::vector<const void*>& resident,
    int shared_bytes) {
  Loaded out = {1000, kMaxCluster};
  for (const auto* kernels : {&streaming, &resident})
    for (const void* kernel : *kernels) {
      cudaFuncAttributes attributes;
      check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
      out.compute_capability = std::min(out.compute_capability, attributes.ptxVersion);
    }
  if (out.compute_capability < 90) return {out.compute_capability, 0};
  for (const void* kernel : resident) {
    check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
    // Several blocks on a multiprocessor, not one and a large L1.
    check(
        cudaFuncSetAttribute(
            kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
            cudaSharedmemCarveoutMaxShared),
        "cudaFuncSetAttribute(PreferredSharedMemoryCarveout)");
    out.largest_cluster = std::min(out.largest_cluster, largest_cluster(kernel, shared_bytes));
  }
  return out;
}

template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...), const Plan& plan, void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute cluster = in_clusters_of(plan.cluster);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  // Also for a cluster of one where the kernel asks its size.
  config.numAttrs = plan.resident || plan.cluster > 1 ? 1 : 0;
  std::tuple<Parameters...> values(arguments...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value...};
        check(
            cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers),
            "cudaLaunchKernelExC");
      },
      values);
}

}  // namespace em_kernels::cuda
