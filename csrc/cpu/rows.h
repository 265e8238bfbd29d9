// Rows, tasks and threads over the block kernels. Included inside the namespace of a level.

// Below this many logits a second thread costs more than it gives.
constexpr int64_t kSerialLogits = 32768;
// With fewer rows than this per thread, threads share rows instead of taking whole ones.
constexpr int64_t kRowsPerThread = 4;

// Calls body(task, scratch) for every task in [0, count), from several threads; a thread takes the
// next task when it has finished one.
template <class T, class F>
static void for_each_task(const Parallel& parallel, int64_t count, const F& body) {
  struct Shared {
    const F& body;
    int64_t count;
    std::atomic<int64_t> next{0};
  } shared{body, count};
  const auto worker = [](void* context) {
    auto& shared = *static_cast<Shared*>(context);
    Scratch<T> scratch;
    for (int64_t task; (task = shared.next.fetch_add(1)) < shared.count;)
      shared.body(task, scratch.u);
  };
  const int threads = int(std::min<int64_t>(parallel.threads, count));
  if (threads > 1) {
    parallel.run(threads, worker, &shared);
  } else {
    worker(&shared);
  }
}

template <class V, class In, Kind K>
struct Rows {
  using T = typename V::T;
  static constexpr Kind kind = K;
  const Problem& p;
  const Results* results;
  const Gradient* g;
  Slice slice;

  bool active(int64_t row) const { return !p.mask || p.mask[row]; }
  int64_t blocks() const { return (p.valid_vocab + kBlock - 1) / kBlock; }
  int64_t block_end(int64_t block) const { return std::min((block + 1) * kBlock, p.valid_vocab); }

  const In* logits(int64_t row) const {
    return static_cast<const In*>(p.logits) + row / p.inner * p.outer_stride +
           row % p.inner * p.inner_stride;
  }
  bool narrows() const { return size_of(g->out_dtype) < size_of(p.dtype); }
  // call(the first entry of a row of the gradient), a pointer to what it holds.
  template <class F>
  void with_out(int64_t row, const F& call) const {
    const int64_t first = row / p.inner * g->outer_stride + row % p.inner * g->inner_stride;
    if constexpr (std::is_same_v<In, float>) {
      if (g->out_dtype == DType::bf16) return call(static_cast<bf16*>(g->out) + first);
      if (g->out_dtype == DType::f16) return call(static_cast<f16*>(g->out) + first);
    }
    call(static_cast<In*>(g->out) + first);
  }
  const T* bias(int64_t v) const { return p.bias ? static_cast<const T*>(p.bias) + v : nullptr; }
  T* column(Output name) const { return static_cast<T*>(results->column[name]); }
  bool wanted(std::initializer_list<Output> names) const {
    return std::any_of(names.begin(), names.end(), [&](Output name) { return column(name); });
  }
  static T read(const void* rows, int64_t row) {
    return rows ? static_cast<const T*>(rows)[row] : T(0);
  }

  bool has_target(int64_t row) const {
    return p.target && slice.first <= p.target[row] &&
           p.target[row] < slice.first + p.valid_vocab;
  }

  // u and its slope at the target.
  Transformed<T> at_target(int64_t row) const {
    const int64_t y = p.target[row] - slice.first;
    In x[V::width] = {};
    T b[V::width] = {}, u[V::width], slope[V::width];
    x[0] = logits(row)[y];
    if (p.bias) b[0] = *bias(y);
    const auto at = transform<K>(V::load(x), p.bias ? b : nullptr, Transform<T>(p, row));
    at.u.store(u);
    at.slope.store(slope);
    return {u[0], slope[0]};
  }

  Part sum_block(int64_t row, int64_t block, T* scratch) const {
    const int64_t begin = block * kBlock, end = block_end(block);
    const In* x = logits(row) + begin;
    const Transform<T> f(p, row);
    const Prefetch next{reinterpret_cast<const char*>(x + kBlock), sizeof(In)};
    const bool moments = wanted({kSelfCertainty, kLogitMean, kLogitVar, kLogitSkew});
    Part part;
    const bool summed = sum_raw(x, end - begin, f, next, part);
    if (moments || !summed) {
      const auto u = load_block<K, V>(x, bias(begin), end - begin, f, scratch);
      if (!summed) part.softmax = sums_of(u, f.c, next);
      if (moments) part.logits = logit_moments<V>(u);
    }
    part.softmax.argmax += slice.first + begin;
    return part;
  }

  template <class B>
  SoftmaxMoments<double> sums_of(const B& block, T c, const Prefetch& next) const {
    const bool second = wanted({kVarentropy, kCollision, kEntropySlope});
    return second ? exp_sums<true, V>(block, c, next) : exp_sums<false, V>(block, c, next);
  }

  // Of 16-bit logits without a copy, where that can be.
  bool sum_raw(
      const In* x, int64_t count, const Transform<T>& f, const Prefetch& next, Part& part) const {
    if constexpr (sizeof(In) == 2 && K != Kind::General) {
      alignas(64) In padded[kBlock];
      RawBlock<In> block;
      if (!find_raw<K, V>(x, count, f.c, padded, block)) return false;
      part.softmax = sums_of(block, f.c, next);
      return true;
    }
    return false;
  }

  double factor(int64_t row) const { return Transform<T>(p, row).c; }

  static void merge_into(Part& row, const Part& block, double c) {
    row.softmax = merge(row.softmax, block.softmax, c);
    row.logits = merge(row.logits, block.logits);
  }

  // What is known of the row before these entries.
  Part start(int64_t row) const { return slice.parts ? slice.parts[row] : Part{}; }

  void finish(int64_t row, Part part) const {
    if (has_target(row)) part.u_target = at_target(row).u;
    if (slice.parts) slice.parts[row] = part;
    write_results(row, part);
  }

  void write_results(int64_t row, const Part& part) const {
    double value[kOutputs] = {};
    const double c = factor(row);
    if (!usable(part.softmax) || std::isnan(c)) {
      std::fill(value, value + kOutputs, std::numeric_limits<double>::quiet_NaN());
    } else {
      finalize(part.softmax, part.logits, c, value);
      if (p.target) {
        const double d = c * (part.u_target - part.softmax.max);
        finalize_target(part.softmax, d, part.softmax.argmax == p.target[row], value);
      }
    }
    for (int name = 0; name < kOutputs; ++name)
      if (T* to = column(Output(name))) to[row] = T(value[name]);
  }

  void write_zeros(int64_t row) const {
    for (int name = 0; name < kOutputs; ++name)
      if (T* to = column(Output(name))) to[row] = 0;
  }

  void stats_row(int64_t row, T* scratch) const {
    if (!active(row)) return write_zeros(row);
    Part part = start(row);
    const double c = factor(row);
    for (int64_t block = 0; block < blocks(); ++block)
      merge_into(part, sum_block(row, block, scratch), c);
    finish(row, part);
  }

  // The gradient of logits [begin, end) of an active row.
  void grad_range(int64_t row, int64_t begin, int64_t end) const {
    with_out(row, [&](auto* to) { grad_to(row, begin, end, to); });
  }

  template <class Out>
  void grad_to(int64_t row, int64_t begin, int64_t end, Out* to) const {
    const T max = read(g->max, row);
    if (std::isnan(max)) return fill(to + begin, to + end, std::numeric_limits<T>::quiet_NaN());
    const Transform<T> f(p, row);
    const double log1p_r = read(g->log1p_r, row), mean_d = read(g->mean_d, row);
    const double logprob = read(g->g_logprob, row), entropy = read(g->g_entropy, row);
    const double lse = read(g->g_lse, row);
    const double share = std::exp(-log1p_r) * f.dz_dx;
    const RowGradient<T> row_gradient{
        max, f.c, T(share * (entropy * mean_d + lse - logprob)), T(-share * entropy)};
    const bool target_here = g->g_logprob && begin <= p.target[row] && p.target[row] < end;
    const Transformed<T> y = target_here ? at_target(row) : Transformed<T>{};
    grad_block<K, V>(logits(row) + begin, bias(begin), end - begin, f, row_gradient, to + begin);
    if (!target_here) return;
    const double d = double(f.c) * (double(y.u) - max), log_p = d - log1p_r, prob = std::exp(log_p);
    double own = -logprob * std::expm1(log_p);
    if (prob > 0) own += prob * (entropy * (mean_d - d) + lse);
    from_float(T(own * y.slope * f.dz_dx), to + p.target[row]);
  }

  // Zeros where there is no gradient: beyond the valid vocabulary, and the whole of a masked row.
  void zero_rest(int64_t row) const {
    const int64_t begin = active(row) ? p.valid_vocab : 0;
    with_out(row, [&](auto* to) { fill(to + begin, to + p.vocab, T(0)); });
  }

  template <class Out>
  static void fill(Out* from, Out* to, T value) {
    Out rounded;
    from_float(value, &rounded);
    std::fill(from, to, rounded);
  }

  void grad_row(int64_t row) const {
    if (active(row)) grad_range(row, 0, p.valid_vocab);
    zero_rest(row);
  }

  // All rows, a row per task, or where rows are few a block per task.
  void run(Parallel parallel) const {
    if (p.rows * p.valid_vocab <= kSerialLogits) parallel.threads = 1;
    if (parallel.threads > 1 && p.rows < kRowsPerThread * parallel.threads && blocks() > 1)
      return run_blocks(parallel);
    for_each_task<T>(parallel, p.rows, [&](int64_t row, T* scratch) {
      if (results) stats_row(row, scratch);
      if (g) grad_row(row);
    });
  }

  void run_blocks(const Parallel& parallel) const {
    const int64_t count = blocks();
    if (results) {
      std::vector<Part> parts(p.rows * count);
      for_each_task<T>(parallel, p.rows * count, [&](int64_t task, T* scratch) {
        const int64_t row = task / count, block = task % count;
        if (active(row)) parts[task] = sum_block(row, block, scratch);
      });
      for (int64_t row = 0; row < p.rows; ++row) {
        if (!active(row)) {
          write_zeros(row);
          continue;
        }
        Part part = start(row);
        const double c = factor(row);
        for (int64_t block = 0; block < count; ++block)
          merge_into(part, parts[row * count + block], c);
        finish(row, part);
      }
    }
    if (!g) return;
    if (narrows())  // what a block writes may lie over another's logits
      return for_each_task<T>(parallel, p.rows, [&](int64_t row, T*) { grad_row(row); });
    for_each_task<T>(parallel, p.rows * count, [&](int64_t task, T*) {
      const int64_t row = task / count, block = task % count;
      if (active(row)) grad_range(row, block * kBlock, block_end(block));
      if (block == count - 1) zero_rest(row);
    });
  }
};

template <class V, class In>
static void run_rows(
    const Problem& p, const Results* results, const Gradient* g, const Slice& slice,
    const Parallel& parallel) {
  switch (Transform<typename V::T>::kind(p)) {
    case Kind::Plain: return Rows<V, In, Kind::Plain>{p, results, g, slice}.run(parallel);
    case Kind::Negated: return Rows<V, In, Kind::Negated>{p, results, g, slice}.run(parallel);
    case Kind::General: return Rows<V, In, Kind::General>{p, results, g, slice}.run(parallel);
  }
}

static void run_dtype(
    const Problem& p, const Results* results, const Gradient* g, const Slice& slice,
    const Parallel& parallel) {
  switch (p.dtype) {
    case DType::f32: return run_rows<F32, float>(p, results, g, slice, parallel);
    case DType::bf16: return run_rows<F32, bf16>(p, results, g, slice, parallel);
    case DType::f16: return run_rows<F32, f16>(p, results, g, slice, parallel);
    case DType::f64: return run_rows<Lanes<double, 4>, double>(p, results, g, slice, parallel);
  }
}

static void stats(
    const Problem& p, const Results& results, const Slice& slice, const Parallel& parallel) {
  run_dtype(p, &results, nullptr, slice, parallel);
}

static void grad(const Problem& p, const Gradient& g, const Parallel& parallel) {
  run_dtype(p, nullptr, &g, {}, parallel);
}

static void loss(
    const Problem& p, const Results& results, const Gradient& g, const Parallel& parallel) {
  run_dtype(p, &results, &g, {}, parallel);
}
