// The kernels compiled for AVX512. Only what follows the pragma uses its instructions.
#include "level.h"

#if defined(EM_X86)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include <immintrin.h>
#endif

namespace em_kernels::cpu {
namespace avx512 {
#include "lanes.h"
#include "exp_table.h"
#include "vec_avx512.h"
#include "math.h"
#include "blocks.h"
#include "rows.h"
#include "above.h"
#include "divergence.h"
}  // namespace avx512
}  // namespace em_kernels::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace em_kernels::cpu {
const Level kAvx512 = {
    "avx512", avx512::stats, avx512::grad, avx512::loss, avx512::above, avx512::divergence};
}  // namespace em_kernels::cpu
#endif
