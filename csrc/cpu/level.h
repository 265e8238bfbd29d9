// What every instruction-set level includes before it switches the compiler to its instructions:
// nothing defined in these headers may be compiled for a processor that is not there.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define EM_X86
#endif

#if defined(_MSC_VER)
#define EM_INLINE __forceinline
#define EM_PREFETCH(address) ((void)(address))
#else
#define EM_INLINE inline __attribute__((always_inline))
#define EM_PREFETCH(address) __builtin_prefetch(address)
#endif

namespace em_kernels::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

extern const Level kPortable;
#if defined(EM_X86)
extern const Level kAvx2;
extern const Level kAvx512;
#endif

}  // namespace em_kernels::cpu
