// The kernels of `neon`, with the int8 dot products (FEAT_DotProd) where codes are multiplied.
#include <arm_neon.h>

#include "kernels.h"

namespace sentfast::cpu::neon {
const Kernels& table();
}

namespace sentfast::cpu::neon_dot {
namespace {
#include "vec_neon.h"
// clang-format off: the order matters
#include "loops.inl.h"
#include "gemm.inl.h"
#include "search_exact.inl.h"
#include "search.inl.h"
// clang-format on
}  // namespace

const Kernels& table() {
  static Kernels filled = [] {
    Kernels t = neon::table();
    t.search.scan[kSearchInt8] = search::scan<search::Int8Step>;
    return t;
  }();
  return filled;
}
}  // namespace sentfast::cpu::neon_dot
