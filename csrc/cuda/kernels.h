// The CUDA kernels as the bindings see them: raw pointers, a stream, and what the device can do.
#pragma once

#include <cstdint>
#include <string>

#include "../problem.h"

namespace em_kernels::cuda {

// statistics fills the results; gradient reads max, log1p_r and mean_d from the Gradient; loss is
// the first and then the second, which takes the three from the results.
enum class Operation : int { statistics, gradient, loss };

// What a launch depends on.
struct Device {
  int compute_capability = 0;         // 90 for 9.0; of the loaded code, where that is less
  int shared_per_block = 0;           // bytes a block may opt in to
  int shared_per_multiprocessor = 0;  // bytes
  int largest_cluster = 0;            // blocks that run as one, each with all it may opt in to
};

// What is known of the kernels once they are loaded for a device.
struct Loaded {
  int compute_capability = 0;  // what their code was written for
  int largest_cluster = 0;
};

// How a call is launched. It does not depend on the number of rows, save for `blocks`, so that a
// row's bits do not either.
struct Plan {
  bool plain = false;     // positive scale, no bias, no softcap, first-order outputs: the fast sums
  bool aligned_logits = false;    // every row begins at a multiple of 16 bytes
  bool aligned_gradient = false;  // vectors of 16 bytes of the logits are vectors of the gradient
  bool resident = false;  // the row is held in shared memory, over the blocks of a cluster
  int cluster = 1;        // blocks per row
  int threads = 0;        // per block
  int64_t blocks = 0;     // in the grid, cluster * rows
  int64_t slice = 0;      // logits of a row per block of its cluster, where resident
  int shared_bytes = 0;   // dynamic, per block
};

// Pure: needs no device. Throws std::invalid_argument for what cannot be launched.
Plan plan(Operation, const Problem&, const Results&, const Gradient&, const Device&);

// Queues the kernel on `stream`, a cudaStream_t. Throws std::runtime_error if CUDA refuses.
void run(Operation, const Problem&, const Results&, const Gradient&, const Device&, void* stream);

// The limits of device `index`, which is the current one, and readies it: all kernels are loaded,
// so that a call after this one can be captured. It can be called in a capture itself, and from
// several threads. Throws std::runtime_error if CUDA refuses.
Device device(int index);

// Loads all kernels for the current device, a block of which may have `shared_bytes`.
Loaded load_kernels(int shared_bytes);

// Why CUDA's runtime, which is compiled in, cannot be used with this driver; empty if it can.
std::string why_no_driver();

// Version of the CUDA runtime compiled in, as 1000 * major + 10 * minor.
int runtime_version();

}  // namespace em_kernels::cuda
