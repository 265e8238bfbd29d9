// The divergence of two rows of logits; em_kernels.backends.divergence has the formulas. Both rows
// go through in blocks, loaded to buffers that stay in the first-level cache: once for the sums and
// once for the gradients, after the statistics of either. Included inside the namespace of a level.

constexpr int64_t kPairBlock = 1024;
constexpr float kNear = 0.5f;  // |u| below which e^-u - 1 + u is a series

// A block of both rows, u in `x` and `y`. `slope` is 1 where the kind is not General.
template <class T>
struct alignas(64) PairBlock {
  T x[kPairBlock], y[kPairBlock];
  T slope[kPairBlock], other_slope[kPairBlock];
  T gradient[kPairBlock], other_gradient[kPairBlock];
};

// What is the same in all entries of a pair of rows.
template <class T>
struct PairRow {
  T max, other_max, share, other_share, gap;  // p = e^d share
  T lead;                                     // (max - other_max) / 2
  T c, other_c;
  T mixed, rest;
  T own_kl, other_kl;
};

template <class V>
struct Entries {
  V p, q, delta;
};

template <bool Same, class V, class T>
EM_INLINE Entries<V> entries(V x, V y, const PairRow<T>& row) {
  const V d = (x - V::set(row.max)) * V::set(row.c);
  const V other_d = (y - V::set(row.other_max)) * V::set(row.other_c);
  const V p = vexp(clamp_exponent(d)) * V::set(row.share);
  const V q = vexp(clamp_exponent(other_d)) * V::set(row.other_share);
  // Exact before it is multiplied, where the rows are nearly alike; of halves, which are finite.
  const V half = V::set(T(0.5)), lead = V::set(row.lead);
  const V apart = Same ? ((x * half - y * half) - lead) * V::set(row.c) * V::set(2) : d - other_d;
  return {p, q, apart - V::set(row.gap)};
}

// p (e^-u - 1 + u), with m = p e^-u; u may be anything where p is 0.
template <class V>
EM_INLINE V excess_of(V p, V m, V u) {
  const V zero = V::set(0), far = fma(p, u - V::set(1), m);
  return select(abs(u) < V::set(kNear), p * excess(u), select(p == zero, m, far));
}

// p (u - kl), 0 where p is.
template <class V>
EM_INLINE V towards(V p, V u, V kl) {
  const V zero = V::set(0);
  return select(p == zero, zero, p * (u - kl));
}

// log(p / m) and log(q / m), m, and q - p.
template <Divergence D, class V>
struct Ratios {
  V own, other, m, difference;

  template <class T>
  static EM_INLINE Ratios of(const Entries<V>& at, const PairRow<T>& row) {
    const V zero = V::set(0), one = V::set(1);
    const auto near = abs(at.delta) < V::set(kNear);
    if constexpr (D == Divergence::kForwardKl) {
      const V u = zero - at.delta, less = excess(u) - u;  // p / q - 1
      return {zero, u, at.p, select(near, zero - at.q * less, at.q - at.p)};
    } else if constexpr (D == Divergence::kReverseKl) {
      const V less = excess(at.delta) - at.delta;
      return {at.delta, zero, at.q, select(near, at.p * less, at.q - at.p)};
    } else {
      const V size = abs(at.delta);
      const auto first = zero < at.delta;  // p is the greater
      const V weight = select(first, V::set(row.mixed), V::set(row.rest));
      const V ratio = vexp(clamp_exponent(zero - size));
      const V lost = select(near, excess(size) - size, ratio - one);
      const V less = weight * lost;
      const V m_over = select(near, one + less, fma(weight, ratio, one - weight));
      const V greater = zero - vlog1p(less, m_over), lesser = greater - size;
      const V m = fma(V::set(row.mixed), at.q, V::set(row.rest) * at.p);
      const V apart = select(first, at.p * lost, zero - at.q * lost);
      return {
          select(first, greater, lesser), select(first, lesser, greater), m,
          select(near, apart, at.q - at.p)};
    }
  }
};

struct PairSums {
  double own = 0, other = 0, difference = 0;
};

template <Divergence D, bool Same, class V, class T>
static PairSums sum_entries(const PairBlock<T>& block, int64_t count, const PairRow<T>& row) {
  V own[kUnroll], other[kUnroll], difference[kUnroll];
  for (int j = 0; j < kUnroll; ++j) own[j] = other[j] = difference[j] = V::set(0);
  for (int64_t i = 0; i < count; i += kStep<V>)
    for (int j = 0; j < kUnroll; ++j) {
      const int64_t at = i + j * V::width;
      const auto e = entries<Same>(V::load(block.x + at), V::load(block.y + at), row);
      const auto ratios = Ratios<D, V>::of(e, row);
      if constexpr (D != Divergence::kForwardKl)
        own[j] = own[j] + excess_of(e.p, ratios.m, ratios.own);
      if constexpr (D != Divergence::kReverseKl)
        other[j] = other[j] + excess_of(e.q, ratios.m, ratios.other);
      difference[j] = difference[j] + ratios.difference;
    }
  return {total(own), total(other), total(difference)};
}

// In z of either row, up to what is the same in a row.
template <Divergence D, bool Same, class V, class T>
static void differentiate(PairBlock<T>& block, int64_t count, const PairRow<T>& row) {
  for (int64_t i = 0; i < count; i += V::width) {
    const auto e = entries<Same>(V::load(block.x + i), V::load(block.y + i), row);
    const auto ratios = Ratios<D, V>::of(e, row);
    V own = V::set(0) - ratios.difference, other = ratios.difference;
    if constexpr (D != Divergence::kForwardKl) own = towards(e.p, ratios.own, V::set(row.own_kl));
    if constexpr (D != Divergence::kReverseKl)
      other = towards(e.q, ratios.other, V::set(row.other_kl));
    own.store(block.gradient + i);
    other.store(block.other_gradient + i);
  }
}

// A block of one row: u in `x`, and its slope where the kind is General. Padded with -inf.
template <Kind K, class V, class In, class T>
static void load_side(
    const In* from, const T* bias, int64_t count, const Transform<T>& f, T* x, T* slope) {
  const auto put = [&](const In* logits, const T* own_bias, int64_t at) {
    const Transformed<V> there = transform<K>(V::load(logits), own_bias, f);
    there.u.store(x + at);
    if constexpr (K == Kind::General) there.slope.store(slope + at);
  };
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) put(from + i, bias ? bias + i : nullptr, i);
  if (i < count) {
    In x_pad[V::width] = {};
    T bias_pad[V::width] = {};
    std::copy(from + i, from + count, x_pad);
    if (bias) std::copy(bias + i, bias + count, bias_pad);
    put(x_pad, bias ? bias_pad : nullptr, i);
  }
  const int64_t padded = (count + kStep<V> - 1) / kStep<V> * kStep<V>;
  std::fill(x + count, x + padded, -std::numeric_limits<T>::infinity());
}

// gradient times slope and factor, to where it goes.
template <class V, class Out, class T>
static void store_side(const T* gradient, const T* slope, int64_t count, T factor, Out* out) {
  const auto at = [&](int64_t i) {
    const V g = V::load(gradient + i) * V::set(factor);
    return slope ? g * V::load(slope + i) : g;
  };
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) at(i).store(out + i);
  if (i == count) return;
  Out pad[V::width];
  at(i).store(pad);
  std::copy(pad, pad + (count - i), out + i);
}

template <class V, class In>
struct OneSide {
  using T = typename V::T;
  const Side& side;
  Kind kind;

  explicit OneSide(const Side& side) : side(side), kind(Transform<T>::kind(side.problem)) {}

  // One of the three kinds of row, as `call` takes it.
  template <class F>
  void with_rows(const F& call) const {
    switch (kind) {
      case Kind::Plain: return call(rows<Kind::Plain>());
      case Kind::Negated: return call(rows<Kind::Negated>());
      case Kind::General: return call(rows<Kind::General>());
    }
  }
  template <Kind K>
  Rows<V, In, K> rows() const {
    return {side.problem, side.results, side.gradient, {}};
  }

  void stats(int64_t row, T* scratch) const {
    with_rows([&](const auto& rows) { rows.stats_row(row, scratch); });
  }

  void load(int64_t row, int64_t begin, int64_t count, T* x, T* slope) const {
    const Transform<T> f(side.problem, row);
    with_rows([&](const auto& rows) {
      load_side<rows.kind, V>(rows.logits(row) + begin, rows.bias(begin), count, f, x, slope);
    });
  }

  // NaN throughout if `bad`, else zeros.
  void fill(int64_t row, bool bad) const {
    if (!side.gradient) return;
    const auto plain = rows<Kind::Plain>();
    const T value = bad ? std::numeric_limits<T>::quiet_NaN() : T(0);
    plain.with_out(row, [&](auto* to) { plain.fill(to, to + side.problem.valid_vocab, value); });
  }

  void zero_rest(int64_t row) const {
    if (side.gradient) rows<Kind::Plain>().zero_rest(row);
  }
};

template <class V, class In>
struct PairsOfRows {
  using T = typename V::T;
  const Pairs& pairs;
  OneSide<V, In> own, other;

  explicit PairsOfRows(const Pairs& pairs) : pairs(pairs), own(pairs.own), other(pairs.other) {}

  const Problem& problem() const { return pairs.own.problem; }
  static T& at(void* column, int64_t row) { return static_cast<T*>(column)[row]; }

  PairRow<T> constants(int64_t row) const {
    const PairSaved& saved = pairs.saved;
    PairRow<T> out;
    out.max = at(saved.max, row);
    out.other_max = at(saved.other_max, row);
    out.share = T(std::exp(-double(at(saved.log1p_r, row))));
    out.other_share = T(std::exp(-double(at(saved.other_log1p_r, row))));
    out.gap = at(saved.gap, row);
    out.lead = out.max / 2 - out.other_max / 2;
    out.c = Transform<T>(pairs.own.problem, row).c;
    out.other_c = Transform<T>(pairs.other.problem, row).c;
    out.mixed = T(pairs.mixed);
    out.rest = T(1 - pairs.mixed);
    out.own_kl = at(saved.own_kl, row);
    out.other_kl = at(saved.other_kl, row);
    return out;
  }

  bool bad(int64_t row) const {
    return std::isnan(at(pairs.saved.max, row)) || std::isnan(at(pairs.saved.other_max, row));
  }

  // body(begin, count) for every block of a row, loaded.
  template <class F>
  void for_blocks(int64_t row, PairBlock<T>& block, const F& body) const {
    for (int64_t begin = 0; begin < problem().valid_vocab; begin += kPairBlock) {
      const int64_t count = std::min(kPairBlock, problem().valid_vocab - begin);
      own.load(row, begin, count, block.x, block.slope);
      other.load(row, begin, count, block.y, block.other_slope);
      body(begin, count);
    }
  }

  template <Divergence D, bool Same>
  PairSums sum(int64_t row, PairBlock<T>& block) const {
    const PairRow<T> constant = constants(row);
    PairSums sums;
    for_blocks(row, block, [&](int64_t, int64_t count) {
      const auto part = sum_entries<D, Same, V>(block, count, constant);
      sums.own += part.own;
      sums.other += part.other;
      sums.difference += part.difference;
    });
    return sums;
  }

  template <Divergence D, bool Same>
  void gradients(int64_t row, PairBlock<T>& block) const {
    const PairRow<T> constant = constants(row);
    const T share = D == Divergence::kJs ? constant.rest : T(1);
    const T other_share = D == Divergence::kJs ? constant.mixed : T(1);
    // Infinite where an entry of the other side is excluded: see the definition.
    const bool own_lost = D == Divergence::kReverseKl && std::isinf(constant.own_kl);
    const bool other_lost = D == Divergence::kForwardKl && std::isinf(constant.other_kl);
    for_blocks(row, block, [&](int64_t begin, int64_t count) {
      differentiate<D, Same, V>(block, count, constant);
      if (!own_lost) put(own, row, begin, count, share, block.gradient, block.slope);
      if (!other_lost)
        put(other, row, begin, count, other_share, block.other_gradient, block.other_slope);
    });
    if (own_lost) own.fill(row, false);  // not before: the logits may lie there
    if (other_lost) other.fill(row, false);
  }

  void put(
      const OneSide<V, In>& to, int64_t row, int64_t begin, int64_t count, T share,
      const T* gradient, const T* slope) const {
    if (!to.side.gradient) return;
    const Transform<T> f(to.side.problem, row);
    const T weight = static_cast<const T*>(to.side.gradient->g_lse)[row];
    const T* own_slope = to.kind == Kind::General ? slope : nullptr;
    to.template rows<Kind::Plain>().with_out(row, [&](auto* out) {
      store_side<V>(gradient, own_slope, count, weight * share * f.dz_dx, out + begin);
    });
  }

  // As `divergence._settled`.
  void settle(int64_t row, const PairSums& sums) const {
    const PairSaved& saved = pairs.saved;
    const double error = -std::log1p(sums.difference), excess = error * error / 2;
    const double mixed = pairs.mixed, rest = 1 - mixed;
    at(saved.gap, row) = T(double(at(saved.gap, row)) + error);
    at(saved.own_kl, row) = T(std::max(0.0, sums.own - mixed * mixed * excess));
    at(saved.other_kl, row) = T(std::max(0.0, sums.other - rest * rest * excess));
  }

  template <Divergence D>
  PairSums sum_of(int64_t row, PairBlock<T>& block) const {
    return is_same(row) ? sum<D, true>(row, block) : sum<D, false>(row, block);
  }
  // Of rows further apart the lesser entry would be lost in the difference.
  bool is_same(int64_t row) const {
    const PairRow<T> constant = constants(row);
    return constant.c == constant.other_c && std::fabs(constant.lead * constant.c) <= T(0.5);
  }

  template <Divergence D>
  void work(int64_t row, T* scratch, PairBlock<T>& block) const {
    const PairSaved& saved = pairs.saved;
    const bool active = own.template rows<Kind::Plain>().active(row);
    const bool made = pairs.own.results != nullptr;
    if (made) {
      own.stats(row, scratch);
      other.stats(row, scratch);
      at(saved.gap, row) = at(saved.log1p_r, row) - at(saved.other_log1p_r, row);
      at(saved.own_kl, row) = at(saved.other_kl, row) = at(saved.gap, row);
    }
    const bool whole = active && !bad(row);
    PairSums sums;
    if (whole && (made || pairs.sums)) sums = sum_of<D>(row, block);
    if (made && whole) settle(row, sums);
    if (pairs.sums) {
      pairs.sums[row] = sums.own;
      pairs.sums[problem().rows + row] = sums.other;
      pairs.sums[2 * problem().rows + row] = sums.difference;
    }
    if (!pairs.own.gradient && !pairs.other.gradient) return;
    if (whole) {
      is_same(row) ? gradients<D, true>(row, block) : gradients<D, false>(row, block);
    } else if (active) {
      own.fill(row, true);
      other.fill(row, true);
    }
    own.zero_rest(row);
    other.zero_rest(row);
  }

  template <Divergence D>
  void run(Parallel parallel) const {
    if (problem().rows * problem().valid_vocab <= kSerialLogits) parallel.threads = 1;
    for_each_task<T>(parallel, problem().rows, [&](int64_t row, T* scratch) {
      PairBlock<T> block;
      work<D>(row, scratch, block);
    });
  }
};

template <class V, class In>
static void run_pairs(const Pairs& pairs, const Parallel& parallel) {
  const PairsOfRows<V, In> rows(pairs);
  switch (pairs.kind) {
    case Divergence::kForwardKl: return rows.template run<Divergence::kForwardKl>(parallel);
    case Divergence::kReverseKl: return rows.template run<Divergence::kReverseKl>(parallel);
    case Divergence::kJs: return rows.template run<Divergence::kJs>(parallel);
  }
}

static void divergence(const Pairs& pairs, const Parallel& parallel) {
  switch (pairs.own.problem.dtype) {
    case DType::f32: return run_pairs<F32, float>(pairs, parallel);
    case DType::bf16: return run_pairs<F32, bf16>(pairs, parallel);
    case DType::f16: return run_pairs<F32, f16>(pairs, parallel);
    case DType::f64: return run_pairs<Lanes<double, 4>, double>(pairs, parallel);
  }
}
