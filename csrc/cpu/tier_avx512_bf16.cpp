// The kernels of `avx512_vnni`, with the bf16 instructions where bf16 is multiplied or made.
#include <immintrin.h>

#include "kernels.h"

namespace sentfast::cpu::avx512_vnni {
const Kernels& table();
}

namespace sentfast::cpu::avx512_bf16 {
namespace {
#include "vec_avx512.h"
// clang-format off: the order matters
#include "loops.inl.h"
#include "rows.inl.h"
#include "gemm.inl.h"
#include "matrix.inl.h"
#include "math.inl.h"
#include "linear_in_place.inl.h"
#include "linear.inl.h"
#include "dropout.inl.h"
#include "attention.inl.h"
#include "layers.inl.h"
#include "search_exact.inl.h"
#include "search.inl.h"
// clang-format on

struct BFloat16Step {
  using Element = BFloat16;
  static constexpr int depth = 2;
  static SENTFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
};
}  // namespace

const Kernels& table() {
  static Kernels filled = [] {
    Kernels t = avx512_vnni::table();
    constexpr int bf16 = static_cast<int>(Dtype::BFloat16);
    t.matrix[bf16][bf16] = matrix::block<BFloat16Step, BFloat16, BFloat16>;
    constexpr int compute = static_cast<int>(Compute::BFloat16);
    t.linear[compute] = linear::linear<BFloat16Step, BFloat16>;
    t.linear_float32[compute] = linear::linear<BFloat16Step, float>;
    t.attention[compute] = attention::attention<BFloat16Step>;
    t.layer_norm = layers::layer_norm;
    t.search.scan[kSearchBf16] = search::scan<search::Bf16Step>;
    t.peak_bfloat16 = matrix::peak<BFloat16Step>;
    return t;
  }();
  return filled;
}
}  // namespace sentfast::cpu::avx512_bf16
