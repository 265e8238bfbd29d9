// The kernels of pairs of rows for Python. Included inside the namespace of bindings.cpp.

// The specification of one side of a pair, and of both.
using SpecTuple = std::tuple<
    OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, double, double, double,
    int64_t>;

const std::unordered_map<std::string, cpu::Divergence> kDivergences = {
    {"forward_kl", cpu::Divergence::kForwardKl},
    {"reverse_kl", cpu::Divergence::kReverseKl},
    {"js", cpu::Divergence::kJs},
};

Call make_call(const Tensor& logits, const SpecTuple& spec) {
  return std::apply([&](const auto&... fields) { return make_call(logits, fields...); }, spec);
}

// A call on pairs of rows, with what keeps its tensors alive.
struct PairCall {
  Call own, other;
  cpu::Pairs pairs;
  Gradient gradients[2];
  Results results[2];

  PairCall(
      const Tensor& logits, const SpecTuple& spec, const Tensor& other_logits,
      const SpecTuple& other_spec, const std::string& kind, double mixed)
      : own(make_call(logits, spec)), other(make_call(other_logits, other_spec)) {
    const auto found = kDivergences.find(kind);
    TORCH_CHECK_VALUE(found != kDivergences.end(), "kind: unknown name '", kind, "'");
    TORCH_CHECK_VALUE(
        logits.scalar_type() == other_logits.scalar_type() &&
            logits.sizes() == other_logits.sizes() &&
            own.problem.valid_vocab == other.problem.valid_vocab,
        "other_logits must have the shape and dtype of logits, got ", other_logits.sizes(), " ",
        other_logits.scalar_type());
    pairs.kind = found->second;
    pairs.mixed = mixed;
    pairs.own.problem = own.problem;
    pairs.other.problem = other.problem;
  }
  PairCall(const PairCall&) = delete;

  int64_t rows() const { return own.problem.rows; }

  void saved(const std::vector<void*>& columns) {
    auto& s = pairs.saved;
    void** to[] = {&s.max, &s.log1p_r, &s.other_max, &s.other_log1p_r,
                   &s.gap, &s.own_kl,  &s.other_kl};
    for (size_t i = 0; i < std::size(to); ++i) *to[i] = columns[i];
  }

  // Rows that are read alone.
  void known(const Tensor& logits, const std::vector<Tensor>& rows) {
    TORCH_CHECK_VALUE(rows.size() == 7, "saved must be 7 tensors, got ", rows.size());
    std::vector<void*> columns;
    for (const Tensor& row : rows)
      columns.push_back(
          const_cast<void*>(own.keep(row, real_type(logits), this->rows(), "saved")));
    saved(columns);
  }

  void gradient(
      int side, const Tensor& logits, const OptionalTensor& weights, const OptionalTensor& out) {
    if (!weights || !out) return;
    Call& call = side ? other : own;
    gradients[side] = make_gradient(call, logits, {}, {}, {}, weights, *out);
    (side ? pairs.other : pairs.own).gradient = &gradients[side];
  }

  void run() { active_level->divergence(pairs, parallel()); }
};

#define EM_PAIR_PARAMETERS                                                                \
  const Tensor &logits, const SpecTuple &spec, const Tensor &other_logits,                \
      const SpecTuple &other_spec, const std::string &kind, double mixed
#define EM_PAIR_ARGUMENTS logits, spec, other_logits, other_spec, kind, mixed

Tensor divergence_sums(EM_PAIR_PARAMETERS, const std::vector<Tensor>& saved) {
  PairCall call(EM_PAIR_ARGUMENTS);
  call.known(logits, saved);
  const Tensor sums = at::empty({3, call.rows()}, logits.options().dtype(at::kDouble));
  call.pairs.sums = sums.mutable_data_ptr<double>();
  call.run();
  return sums;
}

void divergence_grad(
    EM_PAIR_PARAMETERS, const std::vector<Tensor>& saved, const OptionalTensor& weights,
    const OptionalTensor& other_weights, const OptionalTensor& out,
    const OptionalTensor& other_out) {
  PairCall call(EM_PAIR_ARGUMENTS);
  call.known(logits, saved);
  call.gradient(0, logits, weights, out);
  call.gradient(1, other_logits, other_weights, other_out);
  call.run();
}

std::vector<Tensor> divergence_loss(
    EM_PAIR_PARAMETERS, const OptionalTensor& weights, const OptionalTensor& other_weights,
    const OptionalTensor& out, const OptionalTensor& other_out,
    const std::vector<std::string>& outputs, const std::vector<std::string>& other_outputs) {
  PairCall call(EM_PAIR_ARGUMENTS);
  const auto mine = make_results(logits, call.rows(), outputs, call.results[0]);
  const auto theirs = make_results(other_logits, call.rows(), other_outputs, call.results[1]);
  call.pairs.own.results = &call.results[0];
  call.pairs.other.results = &call.results[1];
  std::vector<Tensor> rows = {mine[0], mine[1], theirs[0], theirs[1]};
  for (int i = 0; i < 3; ++i) rows.push_back(at::empty_like(mine[0]));
  std::vector<void*> columns;
  for (const Tensor& row : rows) columns.push_back(row.mutable_data_ptr());
  call.saved(columns);
  call.gradient(0, logits, weights, out);
  call.gradient(1, other_logits, other_weights, other_out);
  call.run();
  rows.insert(rows.end(), mine.begin() + 3, mine.end());
  rows.insert(rows.end(), theirs.begin() + 3, theirs.end());
  return rows;
}
