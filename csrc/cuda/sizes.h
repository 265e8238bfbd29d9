// Sizes the kernels and the launch plan agree on.
#pragma once

namespace em_kernels::cuda {

constexpr int kMaxThreads = 256;  // per block
constexpr int kMaxCluster = 8;    // blocks per row
constexpr int kLoads = 4;         // 16-byte loads in flight per thread: a chunk
constexpr int kMaxChunks = 15;    // per thread, of a row held in shared memory
constexpr int kScratchBytes = 640;         // of shared memory, before the row
constexpr int kResidentBytes = kScratchBytes + 16;  // beside the row, which need not be aligned
constexpr int kStreamScratchBytes = 1024;  // of shared memory, where the row is streamed
constexpr int kPartNumbers = 42000;  // a row has a part for every so many, kMaxCluster at most
constexpr int kSums = 3;             // fields of a Part that hold sums of the first order
constexpr int kAllSums = 13;         // all its fields

}  // namespace em_kernels::cuda
