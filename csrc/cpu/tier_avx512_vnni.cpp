// The kernels of `avx512`, with the int8 dot products where codes are multiplied.
#include <immintrin.h>

#include "kernels.h"

namespace sentfast::cpu::avx512 {
const Kernels& table();
}

namespace sentfast::cpu::avx512_vnni {
namespace {
#include "vec_avx512.h"
// clang-format off: the order matters
#include "loops.inl.h"
#include "gemm.inl.h"
#include "search_exact.inl.h"
#include "search.inl.h"
// clang-format on
}  // namespace

const Kernels& table() {
  static Kernels filled = [] {
    Kernels t = avx512::table();
    t.search.query_codes = search::Int8Step::query_codes;
    t.search.scan[kSearchInt8] = search::scan<search::Int8Step>;
    return t;
  }();
  return filled;
}
}  // namespace sentfast::cpu::avx512_vnni
