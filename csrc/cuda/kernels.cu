// The kernels. `stream_statistics` and `stream_gradient`: rows read from global memory, each by a
// block, or by several where there are few rows.
// `resident_loss`: both at once, a cluster per row, which is brought into shared memory once.
#include "kernels.h"

#include <vector>

#include "gradient.h"
#include "resident.h"

namespace em_kernels::cuda {

template <class In>
EM_DEVICE const In* row_of(const Call& p, int64_t row) {
  return static_cast<const In*>(p.logits) +
         row_offset(row, p.inner, p.outer_stride, p.inner_stride);
}

EM_DEVICE char* gradient_row(const Call& p, const Gradient& g, int64_t row) {
  return static_cast<char*>(g.out) +
         row_offset(row, p.inner, g.outer_stride, g.inner_stride) * size_of(g.out_dtype);
}

// Zeros in the gradient of a row from index `begin` on.
EM_DEVICE void zero_from(
    const Call& p, const Gradient& g, char* out, int64_t begin, int first, int step) {
  const int size = size_of(g.out_dtype);
  store_zeros(out + begin * size, out + p.vocab * size, first, step);
}

EM_DEVICE Extras wanted(const Results& results) {
  Extras out;
  out.moments = results.column[kSelfCertainty] || results.column[kLogitMean] ||
                results.column[kLogitVar] || results.column[kLogitSkew];
  out.argmax = results.column[kIsTop1];
  return out;
}

// Which row, and which of the blocks that it has.
struct Place {
  int64_t row;
  int rank;
};

EM_DEVICE Place place_of(int blocks) {
  const auto block = static_cast<unsigned>(block_index()), of_row = static_cast<unsigned>(blocks);
  if (blocks == 1) return {block, 0};
  return {block / of_row, static_cast<int>(block % of_row)};
}

// A row is summed up in parts of `slice` numbers, by one block or by a cluster that has a block for
// each. A thread joins its shares of them in their order either way, so the bits are the same.
template <class In, class Rows, bool kPlain>
EM_KERNEL(kMaxThreads, kPlain ? Rows::all ? 5 : 3 : 2)
stream_statistics(
    const Call p, EM_PARAMETER(Results) results, const int slice, const int blocks) {
  using T = Real<In>;
  constexpr bool kExtras = !kPlain;
  static_assert(sizeof(BlockScratch<T>) <= kStreamScratchBytes);
  auto& scratch = *reinterpret_cast<BlockScratch<T>*>(shared_memory());
  const auto [row, rank] = place_of(blocks);
  const int thread = thread_index(), n = static_cast<int>(p.valid_vocab);
  T* const own = reinterpret_cast<T*>(shared_memory() + kStreamScratchBytes) + thread;
  if (p.mask && !p.mask[row]) {
    if (rank == 0) put_zeros<T>(results, row, thread);
    return;
  }
  const In* const x = row_of<In>(p, row);
  const Transform<T> transform(p, row);
  const Scaling<T> by = transform.scaling();
#pragma unroll 1
  for (int begin = rank * slice; begin < n; begin += blocks * slice) {
    const Range range = {begin, begin + slice < n ? begin + slice : n, n};
    const Part<T> part = sum_up<Rows, kPlain>(x, range, transform, by, wanted(results));
    join_own<kExtras>(part, begin == rank * slice, own, by.c);
  }
  if (blocks > 1 && !join_blocks<kExtras>(own, rank, (n + slice - 1) / slice, by.c)) return;
  Target<T> target;
  if (thread < 32) target.read(p, row, x, transform);
  const Part<T> part = merge_block<kExtras>(get_part<kExtras>(own), scratch, by.c);
  if (thread < 32) put_row<kExtras>(results, row, part, target, by, thread);
}

// What a block stores last. In shared memory it is out of the way until then.
template <class T>
struct Last {
  char* target;  // null where the target is not the block's
  T at_target;
  char* zeros;
  int64_t zero_bytes;
};

// Block `rank` takes the `slice` numbers from rank * slice on, and the last what is behind them.
template <class In, class Rows, bool kPlain>
EM_KERNEL(kMaxThreads, Rows::all ? 4 : 3)
stream_gradient(const Call p, const Gradient g, const int slice, const int blocks) {
  using T = Real<In>;
  static_assert(sizeof(Last<T>) <= kStreamScratchBytes);
  auto& last = *reinterpret_cast<Last<T>*>(shared_memory());
  const auto [row, rank] = place_of(blocks);
  const int thread = thread_index(), size = size_of(g.out_dtype);
  char* out = gradient_row(p, g, row);
  if (p.mask && !p.mask[row])
    return zero_from(p, g, out, 0, rank * block_threads() + thread, blocks * block_threads());
  const In* const x = row_of<In>(p, row);
  const Transform<T> transform(p, row);
  const Saved<T> saved = {
      read_row<T>(g.max, row), read_row<T>(g.log1p_r, row), read_row<T>(g.mean_d, row)};
  const Upstream<T> upstream(g, row);
  const Slice own(p, rank, slice);
  Target<T> target;
  if (thread == 0 && g.g_logprob && p.target && own.has(p.target[row]))
    target.read(p, row, x, transform);
  sync_block();  // the target's logit is read before anything is overwritten
  const GradientTerms<T> terms(upstream, saved, target, transform);
  if (thread == 0)
    last = {
        terms.has_target ? out + target.y * size : nullptr, terms.at_target,
        out + p.valid_vocab * size, rank + 1 < blocks ? 0 : (p.vocab - p.valid_vocab) * size};
  write_gradient<Rows, kPlain>(
      x + own.begin, own.count, out + own.begin * size, g.out_dtype, transform.from(own.begin),
      terms, InGlobal<true>());
  sync_block();
  if (thread == 0 && last.target)
    store_number<In>(last.at_target, last.target, g.out_dtype, 0);
  store_zeros(last.zeros, last.zeros + last.zero_bytes, thread, block_threads());
}

#if defined(EM_HAS_CLUSTERS)
// Brings the n numbers at `x` into shared memory at `to`, which is as far past a multiple of 16
// bytes: all but the ends by bulk copies. Afterwards chunk k, of `chunk` numbers, is there for who
// has waited for arrivals 0 to k.
template <class In>
EM_DEVICE void bring_in(const In* x, int n, int chunk, In* to, Arrival* arrivals) {
  constexpr int width = Vector<In>::width;
  const int thread = thread_index(), chunks = (n + chunk - 1) / chunk;
  const int past = numbers_past(x), rest = past ? width - past : 0, head = rest < n ? rest : n;
  const int bulk = (n - head) / width * width;
  if (thread == 0) {
    init_arrivals(arrivals, chunks);
    for (int k = 0; k < chunks; ++k) {
      int count = bulk - k * chunk;
      count = count < 0 ? 0 : count > chunk ? chunk : count;
      const int at = head + k * chunk;
      start_copy(to + at, x + at, count * sizeof(In), arrivals + k);
    }
  }
  if (thread < head) to[thread] = x[thread];
  const int at = head + bulk + thread;
  if (at < n) to[at] = x[at];
  sync_block();
}

// One cluster per row: block b holds numbers [b slice, (b + 1) slice) of it in shared memory from
// the first read to the last use, so the logits are read once, and `out` may be the logits.
template <class In>
EM_KERNEL(kMaxThreads, 3)
resident_loss(
    const Call p, EM_PARAMETER(Results) results, const Gradient g, const int64_t slice) {
  using T = Real<In>;
  static_assert(sizeof(ResidentScratch<T>) <= kScratchBytes);
  auto& scratch = *reinterpret_cast<ResidentScratch<T>*>(shared_memory());
  const int rank = cluster_rank(), blocks = cluster_blocks(), thread = thread_index();
  const int64_t row = cluster_index();
  char* const out = gradient_row(p, g, row);
  if (p.mask && !p.mask[row]) {
    if (rank == 0) put_zeros<T>(results, row, thread);
    zero_from(p, g, out, 0, rank * block_threads() + thread, blocks * block_threads());
    return;
  }
  const In* const x = row_of<In>(p, row);
  const Slice part(p, rank, slice);
  const int64_t begin = part.begin;
  const int n = part.count;
  const int chunk = kLoads * Vector<In>::width * block_threads();
  In* const held =
      reinterpret_cast<In*>(shared_memory() + kScratchBytes) + numbers_past(x + begin);
  const int vectors = pad_held(held, n);
  bring_in(x + begin, n, chunk, held, scratch.arrivals);

  // Everything that comes from global memory is asked for while the logits are on their way.
  const Transform<T> transform(p, row);
  const Scaling<T> by = transform.scaling();
  const Upstream<T> upstream(g, row);
  Target<T> target;
  if (thread < 32) target.read(p, row, x, transform);
  sum_up_held(held, vectors, by, scratch);
  // From here on all of the row is in shared memory, so `out` may overwrite it.
  if (thread == 0) publish();
  cluster_arrive();
  cluster_wait();
  if (thread < 32) {
    const Part<T> whole = merge_cluster(scratch.sums, blocks, thread, by);
    const Saved<T> saved =
        put_row<false>(results, row, whole, target, by, rank == 0 ? thread : int(kOutputs));
    if (thread == 0) scratch.saved = saved;
  }
  sync_block();
  // This block has read what it needs of the others: what was read has come through sync_block.
  cluster_arrive();

  const GradientTerms<T> terms(upstream, scratch.saved, target, transform);
  char* const own_out = out + begin * size_of(g.out_dtype);
  if (numbers_past(held + numbers_before<In>(own_out, n, g.out_dtype)) == 0) {
    write_gradient<Aligned, true>(
        held, n, own_out, g.out_dtype, transform, terms, InShared());
  } else {
    write_gradient<Unaligned, true>(
        held, n, own_out, g.out_dtype, transform, terms, InShared());
  }
  sync_block();
  if (thread == 0 && terms.has_target && part.has(target.y))
    store_number<In>(terms.at_target, out, g.out_dtype, target.y);
  zero_from(
      p, g, out, p.valid_vocab, rank * block_threads() + thread, blocks * block_threads());
  cluster_wait();  // the others may still be reading this block's shared memory
}
#else
// Never planned: Device.compute_capability is at most what the loaded code was written for.
template <class In>
EM_KERNEL(kMaxThreads, 3)
resident_loss(const Call, const Results, const Gradient, const int64_t) {
  __trap();
}
#endif

template <class In, bool kPlain>
auto statistics_of(bool aligned) {
  if constexpr (!kPlain) return stream_statistics<In, Any, false>;
  if constexpr (kPlain)
    return aligned ? stream_statistics<In, Aligned, true> : stream_statistics<In, Unaligned, true>;
}

template <class In, bool kPlain>
auto gradient_of(bool aligned) {
  if constexpr (!kPlain) return stream_gradient<In, Any, false>;
  if constexpr (kPlain)
    return aligned ? stream_gradient<In, Aligned, true> : stream_gradient<In, Unaligned, true>;
}

template <class In, bool kPlain>
void stream(
    Operation operation, const Plan& plan, const Call& p, const Results& results,
    const Gradient& g, void* queue) {
  const int slice = static_cast<int>(plan.slice), blocks = plan.row_blocks;
  if (operation == Operation::statistics) {
    launch(statistics_of<In, kPlain>(plan.aligned_logits), plan, queue, p, results, slice, blocks);
  } else {
    launch(gradient_of<In, kPlain>(plan.aligned_gradient), plan, queue, p, g, slice, blocks);
  }
}

template <class In>
void run_on(
    Operation operation, const Plan& plan, const Call& p, const Results& results,
    const Gradient& g, void* queue) {
  if constexpr (sizeof(In) <= 4) {
    if (plan.resident) return launch(resident_loss<In>, plan, queue, p, results, g, plan.slice);
    if (plan.plain) return stream<In, true>(operation, plan, p, results, g, queue);
  }
  stream<In, false>(operation, plan, p, results, g, queue);
}

#if !defined(EM_EMULATED)
template <class... Parameters>
const void* address(void (*kernel)(Parameters...)) {
  return reinterpret_cast<const void*>(kernel);
}

// All that `stream` launches for logits of type In.
template <class In>
void add_streaming(std::vector<const void*>& kernels) {
  if constexpr (sizeof(In) <= 4)
    for (const bool aligned : {true, false}) {
      kernels.push_back(address(statistics_of<In, true>(aligned)));
      kernels.push_back(address(gradient_of<In, true>(aligned)));
    }
  kernels.push_back(address(statistics_of<In, false>(false)));
  kernels.push_back(address(gradient_of<In, false>(false)));
}

Loaded load_kernels(int shared_bytes) {
  std::vector<const void*> streaming;
  add_streaming<float>(streaming);
  add_streaming<bf16>(streaming);
  add_streaming<f16>(streaming);
  add_streaming<double>(streaming);
  return load(
      streaming,
      {address(resident_loss<float>), address(resident_loss<bf16>), address(resident_loss<f16>)},
      shared_bytes);
}
#endif

bool one_stride(const Problem& p, int64_t outer_stride, int64_t inner_stride) {
  return p.rows <= p.inner || outer_stride == p.inner * inner_stride;
}

// Rows that one stride tells are told by one: it saves every thread a division.
void flatten(Problem& p, Gradient& g, bool has_out) {
  if (p.inner == 1 || !one_stride(p, p.outer_stride, p.inner_stride)) return;
  if (has_out && !one_stride(p, g.outer_stride, g.inner_stride)) return;
  p.inner = 1;
  p.outer_stride = p.inner_stride;
  g.outer_stride = g.inner_stride;
}

// `loss` where the row is not held: its two halves.
void run_halves(
    const Problem& p, const Results& results, Gradient g, const Device& device, void* queue) {
  run(Operation::statistics, p, results, {}, device, queue);
  g.max = results.column[kMax];
  g.log1p_r = results.column[kLog1pR];
  g.mean_d = results.column[kMeanD];
  run(Operation::gradient, p, {}, g, device, queue);
}

void run(
    Operation operation, const Problem& problem, const Results& results, const Gradient& gradient,
    const Device& device, void* queue) {
  const Plan how = plan(operation, problem, results, gradient, device);
  if (how.blocks == 0) return;
  if (operation == Operation::loss && !how.resident)
    return run_halves(problem, results, gradient, device, queue);
  Call p(problem);
  Gradient g = gradient;
  flatten(p, g, operation != Operation::statistics);
  switch (p.dtype) {
    case DType::f32: return run_on<float>(operation, how, p, results, g, queue);
    case DType::bf16: return run_on<bf16>(operation, how, p, results, g, queue);
    case DType::f16: return run_on<f16>(operation, how, p, results, g, queue);
    case DType::f64: return run_on<double>(operation, how, p, results, g, queue);
  }
}

}  // namespace em_kernels::cuda
