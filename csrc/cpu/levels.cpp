// Which levels this processor can run.
#include "level.h"

namespace em_kernels::cpu {

static const Level* const* detect() {
  static const Level* levels[4] = {};
  int count = 0;
#if defined(EM_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) levels[count++] = &kAvx512;
  if (avx2) levels[count++] = &kAvx2;
#endif
  levels[count] = &kPortable;
  return levels;
}

const Level* const* usable_levels() {
  static const Level* const* levels = detect();
  return levels;
}

}  // namespace em_kernels::cpu
