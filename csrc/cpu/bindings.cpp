// The kernels for Python: tensors in, raw pointers out, threads from at::parallel_for.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "kernels.h"
#include "product.h"
#include "spare_blocks.h"

namespace {

using namespace em_kernels;
using at::Tensor;
using cpu::Gradient;
using cpu::Level;
using cpu::Parallel;
using cpu::Part;
using cpu::Problem;
using cpu::Results;
using OptionalTensor = std::optional<Tensor>;

const Level* active_level = cpu::usable_levels()[0];

const std::unordered_map<std::string, Output> kOutputNames = {
    {"logprob", kLogprob},         {"entropy", kEntropy},
    {"lse", kLse},                 {"varentropy", kVarentropy},
    {"collision", kCollision},     {"max_prob", kMaxProb},
    {"is_top1", kIsTop1},          {"self_certainty", kSelfCertainty},
    {"logit_mean", kLogitMean},    {"logit_var", kLogitVar},
    {"logit_skew", kLogitSkew},    {"entropy_slope", kEntropySlope},
};

cpu::DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return cpu::DType::f32;
    case at::kBFloat16: return cpu::DType::bf16;
    case at::kHalf: return cpu::DType::f16;
    case at::kDouble: return cpu::DType::f64;
    default: TORCH_CHECK_TYPE(false, "logits must be floating point, got ", x.scalar_type());
  }
}

at::ScalarType real_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void run_threads(int threads, void (*worker)(void*), void* context) {
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) worker(context);
  });
}

Parallel parallel() {
  return {at::in_parallel_region() ? 1 : at::get_num_threads(), run_threads};
}

// Never destroyed: tensors may outlive static objects at exit.
cpu::SpareBlocks& spare_blocks() {
  static auto* blocks = new cpu::SpareBlocks;
  return *blocks;
}

// Below this a fresh allocation costs little.
constexpr size_t kSpareBytes = 8 << 20;

// An uninitialised contiguous tensor, a large one in memory that is kept for the next when freed.
Tensor empty(const std::vector<int64_t>& shape, at::ScalarType dtype) {
  const size_t bytes = c10::multiply_integers(shape) * c10::elementSize(dtype);
  if (bytes < kSpareBytes) return at::empty(shape, dtype);
  const auto block = spare_blocks().take(bytes);
  return at::from_blob(block.start, shape, [block](void*) { spare_blocks().give(block); }, dtype);
}

void release_memory() { spare_blocks().clear(); }

void check_rows_view(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(
      x.dim() == 3 && x.device().is_cpu() && (x.stride(2) == 1 || x.size(2) == 1), name,
      " must be a CPU tensor (outer, inner, V) with unit last stride, got shape ", x.sizes(),
      " and strides ", x.strides());
}

// The specification of a call, with what keeps its tensors alive. Fields as in em_kernels.backends.interface.
struct Call {
  Problem problem;
  std::vector<Tensor> kept;

  const void* keep(const OptionalTensor& x, at::ScalarType dtype, int64_t size, const char* name) {
    if (!x) return nullptr;
    TORCH_CHECK_VALUE(x->numel() == size, name, " must have ", size, " entries, got ", x->numel());
    kept.push_back(x->to(dtype).contiguous());
    return kept.back().const_data_ptr();
  }
};

Call make_call(
    const Tensor& logits, const OptionalTensor& bias, const OptionalTensor& target,
    const OptionalTensor& mask, const OptionalTensor& temperature_rows, double temperature,
    double softcap, double logit_scale, int64_t valid_vocab) {
  check_rows_view("logits", logits);
  Call call;
  Problem& p = call.problem;
  const auto real = real_type(logits);
  p.dtype = dtype_of(logits);
  p.logits = logits.const_data_ptr();
  p.inner = logits.size(1);
  p.rows = logits.size(0) * p.inner;
  p.outer_stride = logits.stride(0);
  p.inner_stride = logits.stride(1);
  p.vocab = logits.size(2);
  p.valid_vocab = valid_vocab;
  TORCH_CHECK_VALUE(
      1 <= valid_vocab && valid_vocab <= p.vocab, "valid_vocab must be in [1, ", p.vocab, "], got ",
      valid_vocab);
  p.bias = call.keep(bias, real, bias ? std::max(valid_vocab, bias->numel()) : 0, "bias");
  p.target = static_cast<const int64_t*>(call.keep(target, at::kLong, p.rows, "target"));
  p.mask = static_cast<const bool*>(call.keep(mask, at::kBool, p.rows, "mask"));
  p.temperature_rows = call.keep(temperature_rows, real, p.rows, "temperature");
  p.temperature = temperature;
  p.softcap = softcap;
  p.logit_scale = logit_scale;
  return call;
}

// Fresh result rows: [max, log1p_r, mean_d, *outputs].
std::vector<Tensor> make_results(
    const Tensor& logits, int64_t rows, const std::vector<std::string>& outputs, Results& results) {
  std::vector<Output> names = {kMax, kLog1pR, kMeanD};
  for (const auto& name : outputs) {
    const auto found = kOutputNames.find(name);
    TORCH_CHECK_VALUE(found != kOutputNames.end(), "outputs: unknown name '", name, "'");
    names.push_back(found->second);
  }
  std::vector<Tensor> tensors;
  for (const Output name : names) {
    tensors.push_back(at::empty({rows}, logits.options().dtype(real_type(logits))));
    results.column[name] = tensors.back().data_ptr();
  }
  return tensors;
}

Gradient make_gradient(
    Call& call, const Tensor& logits, const OptionalTensor& target, const OptionalTensor& g_logprob,
    const OptionalTensor& g_entropy, const OptionalTensor& g_lse, const Tensor& out) {
  check_rows_view("out", out);
  const auto real = real_type(logits), dtype = out.scalar_type();
  const bool narrow =
      logits.scalar_type() == at::kFloat && (dtype == at::kBFloat16 || dtype == at::kHalf);
  TORCH_CHECK_VALUE(
      out.sizes() == logits.sizes() && (narrow || dtype == logits.scalar_type()),
      "out must have the shape and dtype of logits, or 16 bits for float32 ones, got ", out.sizes(),
      " ", dtype);
  const int64_t rows = call.problem.rows;
  TORCH_CHECK_VALUE(!g_logprob || target, "g_logprob needs a target, got None");
  Gradient g;
  g.g_logprob = call.keep(g_logprob, real, rows, "g_logprob");
  g.g_entropy = call.keep(g_entropy, real, rows, "g_entropy");
  g.g_lse = call.keep(g_lse, real, rows, "g_lse");
  g.out = out.data_ptr();
  g.out_dtype = dtype_of(out);
  g.outer_stride = out.stride(0);
  g.inner_stride = out.stride(1);
  return g;
}

#define EM_SPEC_PARAMETERS                                                                     \
  const OptionalTensor &bias, const OptionalTensor &target, const OptionalTensor &mask,        \
      const OptionalTensor &temperature_rows, double temperature, double softcap,              \
      double logit_scale, int64_t valid_vocab
#define EM_SPEC_ARGUMENTS \
  bias, target, mask, temperature_rows, temperature, softcap, logit_scale, valid_vocab

// Rows of which nothing is known yet, (rows, bytes): opaque, for `stats`.
Tensor new_parts(int64_t rows) {
  static_assert(std::is_trivially_copyable_v<Part>);
  const Tensor parts = at::empty({rows, int64_t(sizeof(Part))}, at::kByte);
  std::fill_n(static_cast<Part*>(parts.mutable_data_ptr()), rows, Part{});
  return parts;
}

std::vector<Tensor> stats(
    const Tensor& logits, EM_SPEC_PARAMETERS, const std::vector<std::string>& outputs,
    const OptionalTensor& parts, int64_t first) {
  Call call = make_call(logits, EM_SPEC_ARGUMENTS);
  Results results;
  auto tensors = make_results(logits, call.problem.rows, outputs, results);
  cpu::Slice slice{nullptr, first};
  if (parts) {
    TORCH_CHECK_VALUE(
        parts->is_contiguous() && parts->nbytes() == call.problem.rows * sizeof(Part),
        "parts must be those of new_parts(", call.problem.rows, "), got ", parts->sizes());
    slice.parts = static_cast<Part*>(parts->mutable_data_ptr());
  }
  active_level->stats(call.problem, results, slice, parallel());
  return tensors;
}

void grad(
    const Tensor& logits, EM_SPEC_PARAMETERS, const Tensor& max, const Tensor& log1p_r,
    const Tensor& mean_d, const OptionalTensor& g_logprob, const OptionalTensor& g_entropy,
    const OptionalTensor& g_lse, const Tensor& out) {
  Call call = make_call(logits, EM_SPEC_ARGUMENTS);
  Gradient g = make_gradient(call, logits, target, g_logprob, g_entropy, g_lse, out);
  const auto real = real_type(logits);
  g.max = call.keep(max, real, call.problem.rows, "max");
  g.log1p_r = call.keep(log1p_r, real, call.problem.rows, "log1p_r");
  g.mean_d = call.keep(mean_d, real, call.problem.rows, "mean_d");
  active_level->grad(call.problem, g, parallel());
}

std::vector<Tensor> loss(
    const Tensor& logits, EM_SPEC_PARAMETERS, const OptionalTensor& g_logprob,
    const OptionalTensor& g_entropy, const OptionalTensor& g_lse,
    const std::vector<std::string>& outputs, const Tensor& out) {
  Call call = make_call(logits, EM_SPEC_ARGUMENTS);
  Results results;
  auto tensors = make_results(logits, call.problem.rows, outputs, results);
  Gradient g = make_gradient(call, logits, target, g_logprob, g_entropy, g_lse, out);
  g.max = results.column[kMax];
  g.log1p_r = results.column[kLog1pR];
  g.mean_d = results.column[kMeanD];
  active_level->loss(call.problem, results, g, parallel());
  return tensors;
}

std::pair<Tensor, OptionalTensor> above(
    const Tensor& logits, EM_SPEC_PARAMETERS, const Tensor& levels, const OptionalTensor& top,
    const OptionalTensor& ids) {
  Call call = make_call(logits, EM_SPEC_ARGUMENTS);
  const auto real = real_type(logits);
  const int64_t rows = call.problem.rows;
  TORCH_CHECK_VALUE(
      levels.dim() == 2 && levels.size(0) == rows, "levels must be (", rows, ", K), got shape ",
      levels.sizes());
  cpu::Above above;
  above.count = levels.size(1);
  above.levels = call.keep(levels, real, levels.numel(), "levels");
  above.top = call.keep(top, real, rows, "top");
  above.ids = static_cast<const int64_t*>(call.keep(ids, at::kLong, levels.numel(), "ids"));
  const Tensor counts = at::empty(levels.sizes(), at::kLong);
  OptionalTensor sums;
  above.counts = counts.mutable_data_ptr<int64_t>();
  if (top) {
    sums = at::empty(levels.sizes(), at::kDouble);
    above.sums = sums->mutable_data_ptr<double>();
  }
  active_level->above(call.problem, above, parallel());
  return {counts, sums};
}

#include "pair_bindings.h"

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (auto level = cpu::usable_levels(); *level; ++level) names.push_back((*level)->name);
  return names;
}

void set_isa(const std::string& name) {
  for (auto level = cpu::usable_levels(); *level; ++level) {
    if (name == (*level)->name) {
      active_level = *level;
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "isa must be one of ", isa_levels(), ", got '", name, "'");
}

std::string get_isa() { return active_level->name; }

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "The compiled kernels of em_kernels; em_kernels.backends.cpu is their interface.";
  m.attr("BLOCK") = cpu::kBlock;
  m.def("new_parts", &new_parts);
  m.def("stats", &stats, release());
  m.def("grad", &grad, release());
  m.def("loss", &loss, release());
  m.def("above", &above, release());
  m.def("divergence_sums", &divergence_sums, release());
  m.def("divergence_grad", &divergence_grad, release());
  m.def("divergence_loss", &divergence_loss, release());
  m.def("add_product", &cpu::add_product, release());
  m.def("product", &cpu::product, release());
  m.def("empty", &empty);
  m.def("release_memory", &release_memory);
  m.def("isa_levels", &isa_levels);
  m.def("set_isa", &set_isa);
  m.def("get_isa", &get_isa);
  m.def("compiler", &compiler);
}
