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
  int multiprocessors = 0;
};

// What is known of the kernels once they are loaded for a device.
struct Loaded {
  int compute_capability = 0;  // what their code was written for
  int largest_cluster = 0;
};

// How a call is launched. How many blocks share a row depends on the number of rows, and with that
// which of its gradient a block writes; nothing else does, so that a row's bits do not.
struct Plan {
  bool plain = false;     // positive scale, no bias, no softcap, first-order outputs: the fast sums
  bool aligned_logits = false;    // every row begins at a multiple of 16 bytes
  bool aligned_gradient = false;  // vectors of 16 bytes of the logits are vectors of the gradient
  bool resident = false;  // the row is held in shared memory, over the blocks of a cluster
  int row_blocks = 1;     // blocks per row
  int cluster = 1;        // blocks that run as one: row_blocks where they meet, else 1
  int threads = 0;        // per block
  int64_t blocks = 0;     // in the grid, row_blocks * rows
  int64_t slice = 0;      // logits of a row that a block takes at a time
  int shared_bytes = 0;   // dynamic, per block
};

// Pure: needs no device. Where there are fewer rows than two for each multiprocessor, the blocks of
// a cluster share the statistics of a long row (from compute capability 9.0 on), and blocks of
// their own its gradient, unless it is narrower than the logits, on which it may lie. The plan of a
// `loss` that is not resident is that of its statistics.
// Throws std::invalid_argument for what cannot be launched.
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
