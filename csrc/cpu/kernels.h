// The CPU kernels as the bindings see them: raw pointers, one `Level` per instruction set.
#pragma once

#include <cstdint>

#include "../softmax_moments.h"

namespace em_kernels::cpu {

enum class DType : int { f32, bf16, f16, f64 };

// One call. Row i starts at element (i / inner) * outer_stride + (i % inner) * inner_stride.
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

// Per-row results, Real (rows,) each; null where not asked for.
struct Results {
  void* column[kOutputs] = {};
};

// Real (rows,) each. Null upstreams are zero.
struct Gradient {
  const void* max = nullptr;
  const void* log1p_r = nullptr;
  const void* mean_d = nullptr;
  const void* g_logprob = nullptr;
  const void* g_entropy = nullptr;
  const void* g_lse = nullptr;
  void* out = nullptr;  // same dtype as the logits; may be the logits
  int64_t outer_stride = 0, inner_stride = 0;
};

// How the caller starts threads: `run` calls worker(context) from up to `threads` of them.
struct Parallel {
  int threads = 1;
  void (*run)(int threads, void (*worker)(void*), void* context) = nullptr;
};

struct Level {
  const char* name;
  void (*stats)(const Problem&, const Results&, const Parallel&);
  void (*grad)(const Problem&, const Gradient&, const Parallel&);
  // stats, then grad of the same rows while they are in cache; `saved` comes from the results.
  void (*loss)(const Problem&, const Results&, const Gradient&, const Parallel&);
};

// Compiled and supported by this processor, best first; never empty, ends with null.
const Level* const* usable_levels();

}  // namespace em_kernels::cpu
