// The kernels. `stream_statistics` and `stream_gradient`: a block per row, read from global memory.
// `resident_loss`: both at once, a cluster per row, which is brought into shared memory once.
#include "kernels.h"

#include <type_traits>

#include "sizes.h"
#include "rows.h"
#include "resident.h"

namespace em_kernels::cuda {

// Calls body(vectors, indices, whole) for chunks of kLoads vectors per thread of the n numbers at
// `x`; before(k) comes before chunk k is read. Which thread takes which number when depends on n
// and the number of threads alone, not on how `x` is aligned. `whole` is std::true_type where `x`
// is aligned, `also_aligned` holds and every vector is full: the loop that has to be fast.
template <class In, class Before, class Body>
EM_DEVICE void for_each_chunk(
    const In* x, int n, bool also_aligned, const Before& before, const Body& body) {
  constexpr int width = Vector<In>::width;
  const int stride = block_threads() * width, chunk = kLoads * stride;
  const bool aligned = aligned16(x);
  const int whole = aligned && also_aligned ? n / chunk * chunk : 0;
  Vector<In> v[kLoads];
  int at[kLoads], k = 0, begin = thread_index() * width;
  for (; k * chunk < whole; ++k, begin += chunk) {
    before(k);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      at[i] = begin + i * stride;
      v[i] = load_aligned(x + at[i]);
    }
    body(v, at, std::true_type());
  }
  for (; k * chunk < n; ++k, begin += chunk) {
    before(k);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      at[i] = begin + i * stride;
      v[i] = load_guarded(x + at[i], n - at[i], aligned);
    }
    body(v, at, std::false_type());
  }
}

// This thread's share of the sums over the n numbers at `x`. kPlain: `transform` is simple and
// nothing beyond the first order is wanted.
template <bool kPlain, class In, class Before>
EM_DEVICE Part<Real<In>> sum_up(
    const In* x, int n, const Transform<Real<In>>& transform, const Extras& extras,
    const Before& before) {
  using T = Real<In>;
  constexpr int width = Vector<In>::width;
  const Scaling<T> by = transform.scaling();
  if constexpr (kPlain) {
    Sums<Vector<In>, false> sums;
    const auto body = [&](Vector<In>(&v)[kLoads], const int(&at)[kLoads], auto) {
      sums.add(v, at, by, extras);
    };
    for_each_chunk(x, n, true, before, body);
    return sums.total(by);
  } else {
    Sums<Lanes<T, width>, true> sums;
    const auto body = [&](Vector<In>(&v)[kLoads], const int(&at)[kLoads], auto) {
      Lanes<T, width> z[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k)
#pragma unroll
        for (int i = 0; i < width; ++i)
          z[k].lane[i] = at[k] + i < n ? transform.summand(v[k].get(i), at[k] + i) : T(-INFINITY);
      sums.add(z, at, by, extras);
    };
    for_each_chunk(x, n, true, before, body);
    return sums.total(by);
  }
}

// kWhole: `out` is aligned and `count` is a whole vector.
template <bool kWhole, class Out, class T, int W>
EM_DEVICE void store_as(const Lanes<T, W>& g, void* out, int64_t at, int count, bool aligned) {
  Out* const to = static_cast<Out*>(out) + at;
  if constexpr (kWhole) {
    store_aligned(g, to);
  } else {
    store_guarded(g, to, count, aligned);
  }
}

template <class In, bool kWhole>
EM_DEVICE void store_gradient(
    const Lanes<Real<In>, Vector<In>::width>& g, void* out, DType dtype, int64_t at, int count,
    bool aligned) {
  if constexpr (sizeof(In) == 4) {
    if (dtype == DType::bf16) return store_as<kWhole, bf16>(g, out, at, count, aligned);
    if (dtype == DType::f16) return store_as<kWhole, f16>(g, out, at, count, aligned);
  }
  store_as<kWhole, In>(g, out, at, count, aligned);
}

// The gradient of the n numbers at `x` into `out`.
//
// `out` may lie on the logits. Of the same width, a thread overwrites only what it has read itself.
// A narrow `out` begins at the row's first byte, so number i is written to where number i / 2 was:
// behind all that later chunks read, and within what the block has read once every thread has the
// numbers of its chunk in registers. Hence the one barrier per chunk.
template <bool kPlain, class In>
EM_DEVICE void write_gradient(
    const In* x, int n, void* out, DType dtype, const Transform<Real<In>>& transform,
    const GradientTerms<Real<In>>& terms) {
  using T = Real<In>;
  constexpr int width = Vector<In>::width;
  const Scaling<T> by(1);
  const bool narrow = sizeof(In) == 4 && dtype != DType::f32;
  const bool aligned = narrow ? reinterpret_cast<uintptr_t>(out) % 8 == 0 : aligned16(out);
  const auto body = [&](Vector<In>(&v)[kLoads], const int(&at)[kLoads], auto whole) {
    if (narrow) sync_block();
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      Lanes<T, width> g;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const T number = v[k].get(i);
        if constexpr (kPlain) {
          g.lane[i] = terms({multiply(number, transform.scale), 1}, by);
        } else {
          g.lane[i] = at[k] + i < n ? terms(transform(number, at[k] + i), by) : T(0);
        }
      }
      store_gradient<In, decltype(whole)::value>(g, out, dtype, at[k], n - at[k], aligned);
    }
  };
  for_each_chunk(x, n, aligned, Nothing(), body);
}

template <class In>
EM_DEVICE const In* row_of(const Problem& p, int64_t row) {
  return static_cast<const In*>(p.logits) +
         row_offset(row, p.inner, p.outer_stride, p.inner_stride);
}

EM_DEVICE int size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

EM_DEVICE char* gradient_row(const Problem& p, const Gradient& g, int64_t row) {
  return static_cast<char*>(g.out) +
         row_offset(row, p.inner, g.outer_stride, g.inner_stride) * size_of(g.out_dtype);
}

// Zeros in the gradient of a row from index `begin` on.
EM_DEVICE void zero_from(
    const Problem& p, const Gradient& g, char* out, int64_t begin, int first, int step) {
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

// By one thread, when nothing of the row is read any more.
template <class In>
EM_DEVICE void put_target(
    const GradientTerms<Real<In>>& terms, int64_t y, const Gradient& g, char* out) {
  Lanes<Real<In>, Vector<In>::width> own;
  own.lane[0] = terms.at_target;
  store_gradient<In, false>(own, out, g.out_dtype, y, 1, false);
}

template <class In, bool kPlain>
EM_KERNEL(kMaxThreads, kPlain ? 5 : 2)
stream_statistics(const Problem p, EM_PARAMETER(Results) results) {
  using T = Real<In>;
  static_assert(sizeof(BlockScratch<T>) <= kStreamScratchBytes);
  auto& scratch = *reinterpret_cast<BlockScratch<T>*>(shared_memory());
  const int64_t row = block_index();
  const int thread = thread_index();
  if (p.mask && !p.mask[row]) {
    put_zeros<T>(results, row, thread);
    return;
  }
  const In* const x = row_of<In>(p, row);
  const Transform<T> transform(p, row);
  Target<T> target;
  Part<T> part = sum_up<kPlain>(x, p.valid_vocab, transform, wanted(results), Nothing());
  if (thread < 32) target.read(p, row, x, transform);
  part = merge_block<!kPlain>(part, scratch);
  if (thread < 32) put_row<!kPlain>(results, row, part, target, thread);
}

template <class In, bool kPlain>
EM_KERNEL(kMaxThreads, kPlain ? 4 : 2)
stream_gradient(const Problem p, const Gradient g) {
  using T = Real<In>;
  const int64_t row = block_index();
  const int thread = thread_index();
  char* const out = gradient_row(p, g, row);
  if (p.mask && !p.mask[row]) return zero_from(p, g, out, 0, thread, block_threads());
  const In* const x = row_of<In>(p, row);
  const Transform<T> transform(p, row);
  const Saved<T> saved = {
      read_row<T>(g.max, row), read_row<T>(g.log1p_r, row), read_row<T>(g.mean_d, row)};
  const Upstream<T> upstream(g, row);
  Target<T> target;
  if (thread == 0 && g.g_logprob) target.read(p, row, x, transform);
  sync_block();  // the target's logit is read before anything is overwritten
  const GradientTerms<T> terms(upstream, saved, target, transform);
  write_gradient<kPlain>(x, p.valid_vocab, out, g.out_dtype, transform, terms);
  sync_block();
  if (thread == 0 && terms.has_target) put_target<In>(terms, target.y, g, out);
  zero_from(p, g, out, p.valid_vocab, thread, block_threads());
}

#if defined(EM_HAS_CLUSTERS)
template <class In>
struct alignas(16) Numbers {
  In number[16 / sizeof(In)];
};

// The n numbers at `x`, which need not be aligned, to shared memory: by 16 bytes but for the ends.
template <class In>
EM_DEVICE void copy_numbers(const In* x, int n, In* to) {
  constexpr int width = Vector<In>::width;
  const int thread = thread_index(), step = block_threads();
  const int first = (16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(In);
  const int head = first < n ? first : n, vectors = (n - head) / width;
  for (int i = thread; i < head; i += step) to[i] = x[i];
#pragma unroll 4
  for (int v = thread; v < vectors; v += step) {
    const int at = head + v * width;
    const Numbers<In> some = *reinterpret_cast<const Numbers<In>*>(x + at);
    for (int i = 0; i < width; ++i) to[at + i] = some.number[i];
  }
  for (int i = head + vectors * width + thread; i < n; i += step) to[i] = x[i];
}

// Brings the n numbers at `x` into shared memory, by bulk copies where they are aligned. Afterwards
// chunk k, of `chunk` numbers, is there for those who have waited for arrival k.
template <class In>
EM_DEVICE void bring_in(const In* x, int n, int chunk, In* slice, Arrival* arrivals) {
  constexpr int width = Vector<In>::width;
  const int thread = thread_index(), chunks = (n + chunk - 1) / chunk;
  const int bulk = aligned16(x) ? n / width * width : 0;
  if (thread == 0) {
    init_arrivals(arrivals, chunks);
    for (int k = 0; k < chunks; ++k) {
      int count = bulk - k * chunk;
      count = count < 0 ? 0 : count > chunk ? chunk : count;
      start_copy(slice + k * chunk, x + k * chunk, count * sizeof(In), arrivals + k);
    }
  }
  copy_numbers(x + bulk, n - bulk, slice + bulk);
  sync_block();
}

// One cluster per row: block b holds numbers [b slice, (b + 1) slice) of it in shared memory from
// the first read to the last use, so the logits are read once, and `out` may be the logits.
template <class In>
EM_KERNEL(kMaxThreads, 3)
resident_loss(
    const Problem p, EM_PARAMETER(Results) results, const Gradient g, const int64_t slice) {
  using T = Real<In>;
  static_assert(sizeof(ResidentScratch<T>) <= kScratchBytes);
  auto& scratch = *reinterpret_cast<ResidentScratch<T>*>(shared_memory());
  In* const held = reinterpret_cast<In*>(shared_memory() + kScratchBytes);
  const int rank = cluster_rank(), blocks = cluster_blocks(), thread = thread_index();
  const int64_t row = cluster_index();
  char* const out = gradient_row(p, g, row);
  if (p.mask && !p.mask[row]) {
    if (rank == 0) put_zeros<T>(results, row, thread);
    zero_from(p, g, out, 0, rank * block_threads() + thread, blocks * block_threads());
    return;
  }
  const In* const x = row_of<In>(p, row);
  const int64_t begin = rank * slice, rest = p.valid_vocab - begin;
  const int n = static_cast<int>(rest < 0 ? 0 : rest < slice ? rest : slice);
  const int chunk = kLoads * Vector<In>::width * block_threads();
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
    const Part<T> part = merge_cluster(scratch.sums, blocks, thread, by);
    const Saved<T> saved =
        put_row<false>(results, row, part, target, rank == 0 ? thread : int(kOutputs));
    if (thread == 0) scratch.saved = saved;
  }
  sync_block();
  // This block has read what it needs of the others: what was read has come through sync_block.
  cluster_arrive();

  const GradientTerms<T> terms(upstream, scratch.saved, target, transform);
  char* const own_out = out + begin * size_of(g.out_dtype);
  write_gradient<true>(held, n, own_out, g.out_dtype, transform, terms);
  sync_block();
  const bool has_target = terms.has_target && begin <= target.y && target.y < begin + n;
  if (thread == 0 && has_target) put_target<In>(terms, target.y, g, out);
  zero_from(
      p, g, out, p.valid_vocab, rank * block_threads() + thread, blocks * block_threads());
  cluster_wait();  // the others may still be reading this block's shared memory
}
#else
// Never planned: Device.compute_capability is at most what the loaded code was written for.
template <class In>
EM_KERNEL(kMaxThreads, 3)
resident_loss(const Problem, const Results, const Gradient, const int64_t) {
  __trap();
}
#endif

template <class In, bool kPlain>
void stream(
    Operation operation, const Plan& plan, const Problem& p, const Results& results,
    const Gradient& g, void* queue) {
  if (operation != Operation::gradient)
    launch(stream_statistics<In, kPlain>, plan, queue, p, results);
  if (operation == Operation::statistics) return;
  Gradient after = g;
  if (operation == Operation::loss) {
    after.max = results.column[kMax];
    after.log1p_r = results.column[kLog1pR];
    after.mean_d = results.column[kMeanD];
  }
  launch(stream_gradient<In, kPlain>, plan, queue, p, after);
}

template <class In>
void run_on(
    Operation operation, const Plan& plan, const Problem& p, const Results& results,
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

Loaded load_kernels(int shared_bytes) {
  return load(
      {address(stream_statistics<float, true>), address(stream_statistics<float, false>),
       address(stream_statistics<bf16, true>), address(stream_statistics<bf16, false>),
       address(stream_statistics<f16, true>), address(stream_statistics<f16, false>),
       address(stream_statistics<double, false>), address(stream_gradient<float, true>),
       address(stream_gradient<float, false>), address(stream_gradient<bf16, true>),
       address(stream_gradient<bf16, false>), address(stream_gradient<f16, true>),
       address(stream_gradient<f16, false>), address(stream_gradient<double, false>)},
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

void run(
    Operation operation, const Problem& problem, const Results& results, const Gradient& gradient,
    const Device& device, void* queue) {
  const Plan how = plan(operation, problem, results, gradient, device);
  if (how.blocks == 0) return;
  Problem p = problem;
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
