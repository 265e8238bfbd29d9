// What the CUDA runtime knows of a device.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>

#include "kernels.h"
#include "launch.h"

namespace em_kernels::cuda {
namespace {

int attribute(cudaDeviceAttr which, int index, const char* name) {
  int value = 0;
  check(
      cudaDeviceGetAttribute(&value, which, index),
      (std::string("cudaDeviceGetAttribute(") + name + ")").c_str());
  return value;
}

// While it lives, this thread may do what could disturb a capture on another stream: to load code.
class CaptureAllows {
 public:
  CaptureAllows() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~CaptureAllows() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  CaptureAllows(const CaptureAllows&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

Device device(int index) {
  const CaptureAllows loading;
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, index, "ComputeCapabilityMajor");
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, index, "ComputeCapabilityMinor");
  Device out;
  out.shared_per_block =
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index, "MaxSharedMemoryPerBlockOptin");
  out.shared_per_multiprocessor = attribute(
      cudaDevAttrMaxSharedMemoryPerMultiprocessor, index, "MaxSharedMemoryPerMultiprocessor");
  out.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index, "MultiProcessorCount");
  const Loaded loaded = load_kernels(out.shared_per_block);
  out.compute_capability = std::min(10 * major + minor, loaded.compute_capability);
  out.largest_cluster = loaded.largest_cluster;
  return out;
}

std::string why_no_driver() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

int runtime_version() { return CUDART_VERSION; }

}  // namespace em_kernels::cuda
