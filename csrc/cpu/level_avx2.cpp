// The kernels compiled for AVX2. Only what follows the pragma uses its instructions.
#include "level.h"

#if defined(EM_X86)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#endif

namespace em_kernels::cpu {
namespace avx2 {
#include "lanes.h"
#include "exp_table.h"
#include "vec_avx2.h"
#include "math.h"
#include "blocks.h"
#include "rows.h"
#include "above.h"
#include "divergence.h"
}  // namespace avx2
}  // namespace em_kernels::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace em_kernels::cpu {
const Level kAvx2 = {
    "avx2", avx2::stats, avx2::grad, avx2::loss, avx2::above, avx2::divergence};
}  // namespace em_kernels::cpu
#endif
