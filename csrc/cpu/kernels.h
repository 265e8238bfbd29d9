// The CPU kernels as the bindings see them: raw pointers, one `Level` per instruction set.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace em_kernels::cpu {

using em_kernels::DType;
using em_kernels::Gradient;
using em_kernels::Problem;
using em_kernels::Results;

// How the caller starts threads: `run` calls worker(context) from up to `threads` of them.
struct Parallel {
  int threads = 1;
  void (*run)(int threads, void (*worker)(void*), void* context) = nullptr;
};

// What is known of a row after some of its entries, and u at its target once that was among them.
struct Part {
  SoftmaxMoments<double> softmax;
  LogitMoments<double> logits;
  double u_target = NAN;
};

// A row is summed in blocks of this many entries, each relative to its own maximum, merged in order.
constexpr int64_t kBlock = 4096;

// Where the entries of a call stand in whole rows: from `first` on, after those summed in `parts`
// (rows,), to which these are added. Targets are counted from the beginning of the whole rows.
struct Slice {
  Part* parts = nullptr;
  int64_t first = 0;
};

// Of each row `count` levels, in units of u, and what lies above them; see Backend.above.
struct Above {
  int64_t count = 0;
  const void* levels = nullptr;  // Real (rows, count)
  const void* top = nullptr;     // Real (rows,); null where sums are not asked for
  const int64_t* ids = nullptr;  // (rows, count) or null
  int64_t* counts = nullptr;     // (rows, count)
  double* sums = nullptr;        // (rows, count)
};

enum class Divergence : int { kForwardKl, kReverseKl, kJs };

// What the gradients need of a pair of rows, Real (rows,) each, as em_kernels.backends.pair has it.
struct PairSaved {
  void *max = nullptr, *log1p_r = nullptr, *other_max = nullptr, *other_log1p_r = nullptr;
  void *gap = nullptr, *own_kl = nullptr, *other_kl = nullptr;
};

// One side of a pair. `results` are of its statistics; `gradient` has `g_lse`, the weights of the
// rows, and where it goes. Null where they are not wanted.
struct Side {
  Problem problem;
  const Results* results = nullptr;
  const Gradient* gradient = nullptr;
};

// A call on pairs of rows, of one dtype. With `results` of both sides all of `saved` is made on the
// way, with `sums` (3, rows) those alone; the gradients are made of what is in `saved`.
struct Pairs {
  Side own, other;
  Divergence kind = Divergence::kForwardKl;
  double mixed = 0;
  PairSaved saved;
  double* sums = nullptr;
};

struct Level {
  const char* name;
  void (*stats)(const Problem&, const Results&, const Slice&, const Parallel&);
  void (*grad)(const Problem&, const Gradient&, const Parallel&);
  // stats, then grad of the same rows while they are in cache; `saved` comes from the results.
  void (*loss)(const Problem&, const Results&, const Gradient&, const Parallel&);
  void (*above)(const Problem&, const Above&, const Parallel&);
  void (*divergence)(const Pairs&, const Parallel&);
};

// Compiled and supported by this processor, best first; never empty, ends with null.
const Level* const* usable_levels();

}  // namespace em_kernels::cpu
