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
