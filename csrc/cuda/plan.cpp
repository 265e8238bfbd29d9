// How a call is launched: pure arithmetic, tested without a GPU.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "sizes.h"

namespace em_kernels::cuda {
namespace {

constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;
constexpr int64_t kMaxVocab = int64_t(1) << 30;
constexpr int kReservedBytes = 1024;  // of shared memory, by the system, per block

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

bool all_first_order(const Results& results) {
  for (int output = 0; output < kOutputs; ++output)
    if (results.column[output] && !is_first_order(output)) return false;
  return true;
}

// A warp, doubled until every thread has one chunk at most.
int threads_for(int64_t numbers, int64_t width) {
  int threads = 32;
  while (threads < kMaxThreads && threads * kLoads * width < numbers) threads *= 2;
  return threads;
}

// The smallest cluster whose blocks leave room for `blocks` of them on a multiprocessor; 0 if none.
int cluster_for(int64_t bytes, int blocks, const Device& device) {
  const int64_t room = std::min<int64_t>(
      device.shared_per_block, device.shared_per_multiprocessor / blocks - kReservedBytes);
  for (int cluster = 1; cluster <= std::min(kMaxCluster, device.largest_cluster); cluster *= 2)
    if (round_up((bytes + cluster - 1) / cluster, 16) + kResidentBytes <= room) return cluster;
  return 0;
}

// How many blocks a row takes that give two to every multiprocessor: while one computes, the other
// loads. 1 where there are as many rows.
int64_t wanted_blocks(const Problem& p, const Device& device) {
  const int64_t rows = std::max<int64_t>(p.rows, 1);
  return std::max<int64_t>((2 * int64_t(device.multiprocessors) + rows - 1) / rows, 1);
}

// Statistics of a row are summed up in parts, of a vector a thread and whole chunks. Which parts
// does not depend on the number of rows; where those are few, each block of a cluster has one. A
// cluster is of a power of 2 blocks: those beyond the parts have none.
void share_statistics(Plan& plan, const Problem& p, const Device& device) {
  const int64_t stride = plan.threads * 16 / size_of(p.dtype);
  const int64_t parts = std::clamp<int64_t>(p.valid_vocab / kPartNumbers, 1, kMaxCluster);
  const int64_t rest = (p.valid_vocab + parts - 1) / parts - stride;
  plan.slice = stride + round_up(std::max<int64_t>(rest, 0), kLoads * stride);
  const int fields = plan.plain ? kSums : kAllSums, size = p.dtype == DType::f64 ? 8 : 4;
  plan.shared_bytes = kStreamScratchBytes + fields * size * plan.threads;
  int blocks = 1;
  while (blocks * plan.slice < p.valid_vocab) blocks *= 2;
  const bool meet = device.compute_capability >= 90 && blocks <= device.largest_cluster;
  if (meet && wanted_blocks(p, device) > 1) plan.row_blocks = plan.cluster = blocks;
}

// Any blocks may share the gradient of a row, of two chunks at least. But where it is narrower than
// the logits it may lie on what another block has not read.
void share_gradient(Plan& plan, const Problem& p, bool narrow, const Device& device) {
  const int64_t chunk = int64_t(kLoads) * plan.threads * 16 / size_of(p.dtype);
  const int64_t most = narrow ? 1 : std::max<int64_t>(p.valid_vocab / (2 * chunk), 1);
  const int64_t blocks = std::min(most, wanted_blocks(p, device));
  plan.slice = round_up((p.valid_vocab + blocks - 1) / blocks, chunk);
  plan.row_blocks = static_cast<int>((p.valid_vocab + plan.slice - 1) / plan.slice);
  plan.shared_bytes = kStreamScratchBytes;
}

// While one block computes, others load: three on a multiprocessor if need be over more blocks per
// row, else two, else one.
void hold_row(Plan& plan, int64_t vocab, int64_t size, const Device& device) {
  for (int blocks = 3; blocks >= 1; --blocks) {
    const int cluster = cluster_for(vocab * size, blocks, device);
    if (cluster == 0) continue;
    const int64_t bytes = round_up((vocab * size + cluster - 1) / cluster, 16);
    const int threads = threads_for(bytes / size, 16 / size);
    if (bytes > int64_t(kMaxChunks) * threads * kLoads * 16) continue;
    plan.resident = true;
    plan.row_blocks = plan.cluster = cluster;
    plan.slice = bytes / size;
    plan.threads = threads;
    plan.shared_bytes = int(bytes) + kResidentBytes;
    return;
  }
}

// Whether row i, which begins `outer_stride` and `inner_stride` bytes further on than the one
// before it, begins at a multiple of 16 bytes for every i.
bool aligned_rows(const Problem& p, uintptr_t first, int64_t outer_stride, int64_t inner_stride) {
  return first % 16 == 0 && (p.rows <= p.inner || outer_stride % 16 == 0) &&
         (p.rows <= 1 || p.inner <= 1 || inner_stride % 16 == 0);
}

bool aligned_logits(const Problem& p) {
  const int64_t size = size_of(p.dtype);
  return aligned_rows(
      p, reinterpret_cast<uintptr_t>(p.logits), p.outer_stride * size, p.inner_stride * size);
}

// The same of where the logits of a row begin, less where its gradient would if it were as wide.
bool aligned_gradient(const Problem& p, const Gradient& g) {
  const int64_t size = size_of(p.dtype), ratio = size / size_of(g.out_dtype);
  const auto first = reinterpret_cast<uintptr_t>(p.logits);
  return aligned_rows(
      p, first - ratio * reinterpret_cast<uintptr_t>(g.out),
      (p.outer_stride - g.outer_stride) * size, (p.inner_stride - g.inner_stride) * size);
}

void check(const char* name, bool good, int64_t got, const char* rule) {
  if (!good)
    throw std::invalid_argument(
        std::string(name) + " must be " + rule + ", got " + std::to_string(got));
}

}  // namespace

Plan plan(
    Operation operation, const Problem& p, const Results& results, const Gradient& g,
    const Device& device) {
  check("compute capability", device.compute_capability >= 80, device.compute_capability,
        "at least 80");
  check("V", p.vocab >= 1 && p.vocab <= kMaxVocab, p.vocab, "in [1, 2^30]");
  check("valid_vocab", p.valid_vocab >= 1 && p.valid_vocab <= p.vocab, p.valid_vocab,
        "in [1, V]");
  check("rows", p.rows >= 0 && p.rows <= kMaxBlocks, p.rows, "less than 2^31");
  const bool narrow = p.dtype == DType::f32 && size_of(g.out_dtype) == 2;
  if (operation != Operation::statistics)
    check("dtype of out", g.out_dtype == p.dtype || narrow, int(g.out_dtype),
          "that of the logits, or of 16 bits where they are float32");
  const int64_t size = size_of(p.dtype);
  Plan plan;
  const bool as_it_is = is_simple(p) && p.logit_scale > 0;  // u is x
  plan.plain = p.dtype != DType::f64 && as_it_is && all_first_order(results);
  plan.aligned_logits = aligned_logits(p);
  plan.aligned_gradient = operation != Operation::statistics && aligned_gradient(p, g);
  plan.threads = threads_for(p.valid_vocab, 16 / size);
  const bool saves = results.column[kMax] && results.column[kLog1pR] && results.column[kMeanD];
  if (operation == Operation::loss)
    check("columns", saves, saves, "given for max, log1p_r and mean_d");
  if (operation == Operation::loss && plan.plain && device.compute_capability >= 90)
    hold_row(plan, p.valid_vocab, size, device);
  if (operation == Operation::gradient) {
    share_gradient(plan, p, narrow, device);
  } else if (!plan.resident) {
    share_statistics(plan, p, device);
  }
  check("rows", p.rows <= kMaxBlocks / plan.row_blocks, p.rows, "less than 2^31 / blocks per row");
  plan.blocks = p.rows * plan.row_blocks;
  return plan;
}

}  // namespace em_kernels::cuda
