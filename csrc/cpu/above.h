// What of a row lies above given levels: how many entries, and their mass.
// Included inside the namespace of a level, after rows.h.

// Entries of a block above one level, and the sum of their e.
struct Over {
  double count = 0, sum = 0;
};

template <class V, class T>
static Over count_above(const Block<T>& block, const T* e, T level) {
  const V bound = V::set(level), zero = V::set(T(0)), one = V::set(T(1));
  V counts[kUnroll], sums[kUnroll];
  for (int j = 0; j < kUnroll; ++j) counts[j] = sums[j] = zero;
  for (int64_t i = 0; i < block.size; i += kStep<V>)
    for (int j = 0; j < kUnroll; ++j) {
      const int64_t at = i + j * V::width;
      const auto over = bound < V::load(block.u + at);
      counts[j] = counts[j] + select(over, one, zero);
      if (e) sums[j] = sums[j] + select(over, V::load(e + at), zero);
    }
  return {total(counts), total(sums)};
}

template <class V, class T>
static void exponentials(const Block<T>& block, T top, T c, T* e) {
  for (int64_t i = 0; i < block.size; i += V::width)
    vexp(distance(V::load(block.u + i), V::set(top), V::set(c))).store(e + i);
}

template <class V, class In, Kind K>
struct AboveRows {
  using T = typename V::T;
  const Rows<V, In, K> rows;
  const Above& above;

  const T* levels(int64_t row) const {
    return static_cast<const T*>(above.levels) + row * above.count;
  }

  T top(int64_t row) const { return Rows<V, In, K>::read(above.top, row); }

  void add(int64_t row, int64_t k, const Over& over) const {
    above.counts[row * above.count + k] += int64_t(over.count);
    if (above.sums) above.sums[row * above.count + k] += over.sum;
  }

  // Those that equal the level and come before the id.
  Over ties(int64_t row, int64_t k, const Block<T>& block, int64_t begin, int64_t end) const {
    const T level = levels(row)[k];
    const int64_t before = std::clamp(above.ids[row * above.count + k], begin, end) - begin;
    const auto count = std::count(block.u, block.u + before, level);
    if (!above.sums || count == 0) return {double(count), 0};
    return {double(count), double(count) * std::exp(rows.factor(row) * (double(level) - top(row)))};
  }

  void add_block(int64_t row, int64_t index, T* scratch, T* e) const {
    const int64_t begin = index * kBlock, end = rows.block_end(index);
    const Transform<T> f(rows.p, row);
    const auto block =
        load_block<K, V>(rows.logits(row) + begin, rows.bias(begin), end - begin, f, scratch);
    const T* level = levels(row);
    const T lowest = *std::min_element(level, level + above.count);
    if (above.sums && !(block.max <= lowest))
      exponentials<V>(block, top(row), f.c, e);
    for (int64_t k = 0; k < above.count; ++k) {
      if (level[k] < block.max)
        add(row, k, count_above<V>(block, above.sums ? e : nullptr, level[k]));
      if (above.ids && level[k] <= block.max) add(row, k, ties(row, k, block, begin, end));
    }
  }

  void run(Parallel parallel) const {
    if (rows.p.rows * rows.p.valid_vocab <= kSerialLogits) parallel.threads = 1;
    for_each_task<T>(parallel, rows.p.rows, [&](int64_t row, T* scratch) {
      std::fill_n(above.counts + row * above.count, above.count, int64_t(0));
      if (above.sums) std::fill_n(above.sums + row * above.count, above.count, 0.0);
      if (!rows.active(row) || above.count == 0) return;
      Scratch<T> e;
      for (int64_t index = 0; index < rows.blocks(); ++index)
        add_block(row, index, scratch, e.u);
    });
  }
};

template <class V, class In>
static void above_rows(const Problem& p, const Above& a, const Parallel& parallel) {
  switch (Transform<typename V::T>::kind(p)) {
    case Kind::Plain:
      return AboveRows<V, In, Kind::Plain>{{p, nullptr, nullptr, {}}, a}.run(parallel);
    case Kind::Negated:
      return AboveRows<V, In, Kind::Negated>{{p, nullptr, nullptr, {}}, a}.run(parallel);
    case Kind::General:
      return AboveRows<V, In, Kind::General>{{p, nullptr, nullptr, {}}, a}.run(parallel);
  }
}

static void above(const Problem& p, const Above& a, const Parallel& parallel) {
  switch (p.dtype) {
    case DType::f32: return above_rows<F32, float>(p, a, parallel);
    case DType::bf16: return above_rows<F32, bf16>(p, a, parallel);
    case DType::f16: return above_rows<F32, f16>(p, a, parallel);
    case DType::f64: return above_rows<Lanes<double, 4>, double>(p, a, parallel);
  }
}
