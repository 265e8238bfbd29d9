// One call on rows of logits, as the CPU and the CUDA kernels see it: raw pointers, no torch.
#pragma once

#include <cstdint>

#include "softmax_moments.h"

namespace em_kernels {

enum class DType : int { f32, bf16, f16, f64 };

EM_HOST_DEVICE constexpr int size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Row i starts at element (i / inner) * outer_stride + (i % inner) * inner_stride.
// `Real` below is double for f64 and float otherwise.
struct Problem {
  DType dtype = DType::f32;
  const void* logits = nullptr;
  int64_t rows = 0, inner = 1, outer_stride = 0, inner_stride = 0;
  int64_t vocab = 0, valid_vocab = 0;
  const void* bias = nullptr;              // Real (vocab,)
  const int64_t* target = nullptr;         // (rows,), read only where the mask is set
  const bool* mask = nullptr;              // (rows,)
  const void* temperature_rows = nullptr;  // Real (rows,), in place of `temperature`
  double temperature = 1, softcap = 0, logit_scale = 1;
};

// Whether u is x or -x; see softmax_moments.h. Differences of neighbours of the maximum are exact
// then, whatever the temperature.
EM_HOST_DEVICE inline bool is_simple(const Problem& p) {
  return !p.bias && p.softcap == 0 && p.logit_scale != 0;
}

// du/dx, but for the slope of the softcap.
EM_HOST_DEVICE inline double unit_scale(const Problem& p) {
  return !is_simple(p) ? p.logit_scale : p.logit_scale > 0 ? 1 : -1;
}

// c times the temperature.
EM_HOST_DEVICE inline double gain(const Problem& p) {
  return !is_simple(p) ? 1 : p.logit_scale > 0 ? p.logit_scale : -p.logit_scale;
}

// Per-row results, Real (rows,) each; null where not asked for.
struct Results {
  void* column[kOutputs] = {};
};

// Real (rows,) each. Null upstreams are zero. `out` may be the logits.
struct Gradient {
  const void* max = nullptr;
  const void* log1p_r = nullptr;
  const void* mean_d = nullptr;
  const void* g_logprob = nullptr;
  const void* g_entropy = nullptr;
  const void* g_lse = nullptr;
  void* out = nullptr;
  int64_t outer_stride = 0, inner_stride = 0;
  // That of the logits, or for f32 ones bf16 or f16: then a row of `out` may begin at the byte
  // where its row of logits begins.
  DType out_dtype = DType::f32;
};

}  // namespace em_kernels
