// The kernels in plain C++, for any processor.
#include "level.h"

namespace em_kernels::cpu {
namespace portable {
#include "lanes.h"
#if defined(__GNUC__)
#include "vec_generic.h"
#else
using F32 = Lanes<float, 8>;
#endif
#include "halves.h"
#include "math.h"
#include "blocks.h"
#include "rows.h"
#include "above.h"
#include "divergence.h"
}  // namespace portable

const Level kPortable = {
    "portable", portable::stats, portable::grad, portable::loss, portable::above, portable::divergence};
}  // namespace em_kernels::cpu
