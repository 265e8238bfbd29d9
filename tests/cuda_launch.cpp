// csrc/cuda/launch.h, runtime.cpp and plan.cpp on a pretended GPU: CUDA's runtime is the functions
// below, which answer from the command line and write down what they are asked.
//
//     launch CAPABILITY PTX CLUSTER    of the GPU, of the loaded code, the largest that can run
//
// Prints JSON: the device, what loading it did, each launch of a loss, and those of statistics of a
// few rows and of many.
#include <cstdio>
#include <cstdlib>
#include <set>

#include "../csrc/cuda/launch.h"

namespace {

using namespace em_kernels;
using namespace em_kernels::cuda;

int capability, ptx, clusters;
int set_attributes = 0, loaded = 0, outside = 0;  // calls; those that a capture would forbid
cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
cudaError_t last = cudaSuccess;
std::set<const void*> allowed;  // kernels whose blocks may have all the shared memory

void unsafe() { outside += mode != cudaStreamCaptureModeRelaxed; }

void streaming(Problem, Results) {}
void resident(Problem, Results, Gradient, int64_t) {}
void other(Problem, Results, Gradient, int64_t) {}

template <class Kernel>
const void* address(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

void launch_one(
    Operation operation, int64_t vocab, int64_t rows, const Device& device, const char* before) {
  Problem problem;
  problem.dtype = DType::bf16;
  problem.rows = rows;
  problem.vocab = problem.valid_vocab = vocab;
  Results results;
  for (const int name : {kMax, kLog1pR, kMeanD}) results.column[name] = &results;
  Gradient gradient;
  gradient.out_dtype = DType::bf16;
  const Plan how = plan(operation, problem, results, gradient, device);
  std::printf("%s{\"vocab\": %d, \"resident\": %d, \"cluster\": %d, ", before, int(vocab),
              int(how.resident), how.cluster);
  if (how.resident) {
    launch(resident, how, &problem, problem, results, gradient, how.slice);
  } else {
    launch(streaming, how, &problem, problem, results);
  }
}

}  // namespace

namespace em_kernels::cuda {
Loaded load_kernels(int bytes) {
  return load({address(streaming)}, {address(resident), address(other)}, bytes);
}
}  // namespace em_kernels::cuda

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "name"; }
const char* cudaGetErrorString(cudaError_t) { return "text"; }
cudaError_t cudaGetLastError() {
  const cudaError_t out = last;
  last = cudaSuccess;
  return out;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(mode, *other);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const bool block = which == cudaDevAttrMaxSharedMemoryPerBlockOptin;
  *value = which == cudaDevAttrComputeCapabilityMajor   ? capability / 10
           : which == cudaDevAttrComputeCapabilityMinor ? capability % 10
           : which == cudaDevAttrMultiProcessorCount    ? 132
           : block                                      ? 232448
                                                        : 233472;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  unsafe();
  ++loaded;
  *attributes = {};
  attributes->ptxVersion = ptx;
  attributes->binaryVersion = capability;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
  unsafe();
  ++set_attributes;
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize && value == 232448)
    allowed.insert(kernel);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(
    int* count, const void* kernel, const cudaLaunchConfig_t* config) {
  unsafe();
  const int blocks = static_cast<int>(config->attrs[0].val.clusterDim.x);
  const bool fits = allowed.count(kernel) && config->dynamicSmemBytes == 232448;
  *count = fits && blocks <= clusters;
  // The first that is refused is refused by an error.
  return last = blocks == 8 && *count == 0 ? cudaErrorInvalidClusterSize : cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(
    const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  const auto& problem = *static_cast<Problem*>(arguments[0]);
  const bool named = config->numAttrs == 1 && config->attrs[0].id == cudaLaunchAttributeClusterDimension;
  std::printf(
      "\"blocks\": %u, \"named_cluster\": %d, \"rows\": %d, \"slice\": %d}", config->gridDim.x,
      named ? int(config->attrs[0].val.clusterDim.x) : 0, int(problem.rows),
      kernel == address(resident) ? int(*static_cast<int64_t*>(arguments[3])) : 0);
  return cudaSuccess;
}
}

int main(int, char** words) {
  capability = std::atoi(words[1]);
  ptx = std::atoi(words[2]);
  clusters = std::atoi(words[3]);
  const Device d = device(0);
  std::printf(
      "{\"capability\": %d, \"largest_cluster\": %d, \"loaded\": %d, \"set\": %d, \"unsafe\": %d, "
      "\"mode_restored\": %d, \"error_left\": %d, \"launches\": [",
      d.compute_capability, d.largest_cluster, loaded, set_attributes, outside,
      mode == cudaStreamCaptureModeGlobal, last);
  launch_one(Operation::loss, 1000, 3, d, "");
  launch_one(Operation::loss, 151936, 3, d, ", ");
  std::printf("], \"statistics\": [");
  launch_one(Operation::statistics, 151936, 3, d, "");
  launch_one(Operation::statistics, 151936, 1000, d, ", ");
  std::printf("], \"set_by_launches\": %d}\n", set_attributes);
}
