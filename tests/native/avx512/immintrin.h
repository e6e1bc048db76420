// AVX-512 for a CPU without it: what the kernels use of its intrinsics, as plain loops and AVX2.
//
// A tier compiled with this folder before the system's headers runs its own loops, tiles and strides, so a sanitizer
// sees every element it touches. Only the instructions are replaced: the functions lie in the tiers' namespace, where
// their names hide the compiler's.
#pragma once

#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define SENTFAST_EMULATED 1
#define __AVX512F__ 1
#define __AVX512BW__ 1
#ifdef SENTFAST_EMULATED_BF16
#define __AVX512BF16__ 1
#endif

// Where a compiler has macros for them.
#undef _mm512_cmp_ps_mask
#undef _mm512_cmpeq_epi32_mask
#undef _mm512_cmpge_epu32_mask
#undef _mm512_cvtps_ph
#undef _mm512_extractf32x8_ps
#undef _mm512_extractf64x4_pd
#undef _mm512_roundscale_ps
#undef _mm512_setr_epi32
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_ps

namespace sentfast::cpu {

#define SENTFAST_EMULATE static inline __attribute__((always_inline))

typedef int32_t Int32x16 __attribute__((vector_size(64)));
typedef uint32_t Uint32x16 __attribute__((vector_size(64)));
typedef int16_t Int16x32 __attribute__((vector_size(64)));
typedef uint16_t Uint16x32 __attribute__((vector_size(64)));
typedef uint64_t Uint64x8 __attribute__((vector_size(64)));

// The same bits as another type of the same size.
template <class To, class From>
SENTFAST_EMULATE To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &x, sizeof(To));
  return to;
}

struct Halves {
  __m256 low, high;
};

SENTFAST_EMULATE __m512 joined(__m256 low, __m256 high) { return bits_as<__m512>(Halves{low, high}); }

// Calls f(lane) for the lanes of a mask.
template <class F>
SENTFAST_EMULATE void each_lane(__mmask16 mask, F f) {
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) f(i);
  }
}

// The lanes of which f(lane) is true.
template <class F>
SENTFAST_EMULATE __mmask16 lanes_where(F f) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (f(i) ? 1u : 0u) << i;
  return static_cast<__mmask16>(mask);
}

// ---- loads and stores ----

template <class Vector, class Element>
SENTFAST_EMULATE Vector load_lanes(const void* from, __mmask16 mask) {
  Element lanes[sizeof(Vector) / sizeof(Element)] = {};
  each_lane(mask, [&](int i) { std::memcpy(lanes + i, static_cast<const Element*>(from) + i, sizeof(Element)); });
  return bits_as<Vector>(lanes);
}
template <class Element, class Vector>
SENTFAST_EMULATE void store_lanes(void* to, __mmask16 mask, const Vector& x) {
  Element lanes[sizeof(Vector) / sizeof(Element)];
  std::memcpy(lanes, &x, sizeof(Vector));
  each_lane(mask, [&](int i) { std::memcpy(static_cast<Element*>(to) + i, lanes + i, sizeof(Element)); });
}

SENTFAST_EMULATE __m512 _mm512_loadu_ps(const void* p) {
  const float* from = static_cast<const float*>(p);
  return joined(_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8));
}
SENTFAST_EMULATE __m512i _mm512_loadu_si512(const void* p) { return bits_as<__m512i>(_mm512_loadu_ps(p)); }
SENTFAST_EMULATE void _mm512_storeu_ps(void* p, __m512 x) {
  const Halves halves = bits_as<Halves>(x);
  _mm256_storeu_ps(static_cast<float*>(p), halves.low);
  _mm256_storeu_ps(static_cast<float*>(p) + 8, halves.high);
}
SENTFAST_EMULATE __m512 _mm512_maskz_loadu_ps(__mmask16 m, const void* p) { return load_lanes<__m512, float>(p, m); }
SENTFAST_EMULATE __m512i _mm512_maskz_loadu_epi32(__mmask16 m, const void* p) {
  return load_lanes<__m512i, int32_t>(p, m);
}
SENTFAST_EMULATE __m256 _mm256_maskz_loadu_ps(__mmask8 m, const void* p) { return load_lanes<__m256, float>(p, m); }
SENTFAST_EMULATE __m256i _mm256_maskz_loadu_epi16(__mmask16 m, const void* p) {
  return load_lanes<__m256i, int16_t>(p, m);
}
SENTFAST_EMULATE void _mm512_mask_storeu_ps(void* p, __mmask16 m, __m512 x) { store_lanes<float>(p, m, x); }
SENTFAST_EMULATE void _mm512_mask_storeu_epi32(void* p, __mmask16 m, __m512i x) { store_lanes<int32_t>(p, m, x); }
SENTFAST_EMULATE void _mm256_mask_storeu_epi16(void* p, __mmask16 m, __m256i x) { store_lanes<int16_t>(p, m, x); }

// ---- the same in every lane ----

SENTFAST_EMULATE __m512 _mm512_set1_ps(float x) { return joined(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
SENTFAST_EMULATE __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.0f); }
SENTFAST_EMULATE __m512 _mm512_broadcastss_ps(__m128 x) { return _mm512_set1_ps(_mm_cvtss_f32(x)); }
SENTFAST_EMULATE __m512i _mm512_set1_epi32(int x) { return bits_as<__m512i>(Int32x16{} + x); }
SENTFAST_EMULATE __m512i _mm512_set1_epi16(short x) { return bits_as<__m512i>(Int16x32{} + x); }
template <class... Lanes>
SENTFAST_EMULATE __m512i _mm512_setr_epi32(Lanes... lanes) {
  return bits_as<__m512i>(Int32x16{lanes...});
}

// ---- floats ----

SENTFAST_EMULATE __m512i _mm512_castps_si512(__m512 x) { return bits_as<__m512i>(x); }
SENTFAST_EMULATE __m512 _mm512_castsi512_ps(__m512i x) { return bits_as<__m512>(x); }
SENTFAST_EMULATE __m256 _mm512_castps512_ps256(__m512 x) { return bits_as<Halves>(x).low; }
SENTFAST_EMULATE __m256 _mm512_extractf32x8_ps(__m512 x, int half) {
  return half == 0 ? bits_as<Halves>(x).low : bits_as<Halves>(x).high;
}

SENTFAST_EMULATE __m256d _mm512_castpd512_pd256(__m512d x) {
  return _mm256_castps_pd(_mm512_castps512_ps256(bits_as<__m512>(x)));
}
SENTFAST_EMULATE __m256d _mm512_extractf64x4_pd(__m512d x, int half) {
  return _mm256_castps_pd(_mm512_extractf32x8_ps(bits_as<__m512>(x), half));
}

// Calls f for both halves.
template <class F>
SENTFAST_EMULATE __m512 by_halves(__m512 a, __m512 b, F f) {
  const Halves x = bits_as<Halves>(a), y = bits_as<Halves>(b);
  return joined(f(x.low, y.low), f(x.high, y.high));
}

SENTFAST_EMULATE __m512 _mm512_add_ps(__m512 a, __m512 b) {
  return by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_add_ps(x, y); });
}
SENTFAST_EMULATE __m512 _mm512_sub_ps(__m512 a, __m512 b) {
  return by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_sub_ps(x, y); });
}
SENTFAST_EMULATE __m512 _mm512_mul_ps(__m512 a, __m512 b) {
  return by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_mul_ps(x, y); });
}
SENTFAST_EMULATE __m512 _mm512_div_ps(__m512 a, __m512 b) {
  return by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_div_ps(x, y); });
}
SENTFAST_EMULATE __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); });
}
SENTFAST_EMULATE __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_min_ps(x, y); });
}
SENTFAST_EMULATE __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Halves x = bits_as<Halves>(a), y = bits_as<Halves>(b), z = bits_as<Halves>(c);
  return joined(_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high));
}
SENTFAST_EMULATE __m512 _mm512_abs_ps(__m512 x) {
  return by_halves(x, x, [](__m256 y, __m256) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), y); });
}
SENTFAST_EMULATE __m512 _mm512_roundscale_ps(__m512 x, int) {
  return by_halves(x, x,
                   [](__m256 y, __m256) { return _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); });
}
SENTFAST_EMULATE __m512 _mm512_scalef_ps(__m512 x, __m512 n) {
  __m512 y;
  for (int i = 0; i < 16; ++i) y[i] = n[i] == n[i] ? std::ldexp(x[i], static_cast<int>(std::floor(n[i]))) : n[i];
  return y;
}

// Places of each quarter of a, then of b, as two bits each.
SENTFAST_EMULATE __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int places) {
  __m512 y;
  for (int i = 0; i < 16; ++i) {
    const int from = i / 4 * 4 + (places >> i % 4 * 2 & 3);
    y[i] = i % 4 < 2 ? a[from] : b[from];
  }
  return y;
}
// Quarters of a, then of b.
SENTFAST_EMULATE __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int places) {
  __m512 y;
  for (int i = 0; i < 16; ++i) {
    const int from = (places >> i / 4 * 2 & 3) * 4 + i % 4;
    y[i] = i < 8 ? a[from] : b[from];
  }
  return y;
}
SENTFAST_EMULATE __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  return by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_unpacklo_ps(x, y); });
}
SENTFAST_EMULATE __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_unpackhi_ps(x, y); });
}

// ---- masks ----

SENTFAST_EMULATE __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int kind) {
  return lanes_where([&](int i) {
    switch (kind) {
      case _CMP_GT_OQ:
        return a[i] > b[i];
      case _CMP_LT_OQ:
        return a[i] < b[i];
      case _CMP_NLE_UQ:
        return !(a[i] <= b[i]);
      case _CMP_ORD_Q:
        return a[i] == a[i] && b[i] == b[i];
      case _CMP_UNORD_Q:
        return a[i] != a[i] || b[i] != b[i];
      default:
        __builtin_trap();
    }
  });
}
SENTFAST_EMULATE __mmask16 _mm512_cmpeq_epi32_mask(__m512i a, __m512i b) {
  const auto x = bits_as<Int32x16>(a), y = bits_as<Int32x16>(b);
  return lanes_where([&](int i) { return x[i] == y[i]; });
}
SENTFAST_EMULATE __mmask16 _mm512_cmpge_epu32_mask(__m512i a, __m512i b) {
  const auto x = bits_as<Uint32x16>(a), y = bits_as<Uint32x16>(b);
  return lanes_where([&](int i) { return x[i] >= y[i]; });
}
SENTFAST_EMULATE __m512 _mm512_mask_mov_ps(__m512 other, __mmask16 m, __m512 x) {
  each_lane(m, [&](int i) { other[i] = x[i]; });
  return other;
}
SENTFAST_EMULATE __m512 _mm512_maskz_mov_ps(__mmask16 m, __m512 x) {
  return _mm512_mask_mov_ps(_mm512_setzero_ps(), m, x);
}
SENTFAST_EMULATE __m512 _mm512_mask_blend_ps(__mmask16 m, __m512 a, __m512 b) { return _mm512_mask_mov_ps(a, m, b); }
SENTFAST_EMULATE __m512i _mm512_mask_blend_epi32(__mmask16 m, __m512i a, __m512i b) {
  return bits_as<__m512i>(_mm512_mask_mov_ps(bits_as<__m512>(a), m, bits_as<__m512>(b)));
}
SENTFAST_EMULATE __m512i _mm512_mask_set1_epi32(__m512i other, __mmask16 m, int x) {
  return _mm512_mask_blend_epi32(m, other, _mm512_set1_epi32(x));
}

// ---- integers ----

SENTFAST_EMULATE __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return bits_as<__m512i>(bits_as<Uint32x16>(a) + bits_as<Uint32x16>(b));
}
SENTFAST_EMULATE __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
SENTFAST_EMULATE __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
SENTFAST_EMULATE __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
SENTFAST_EMULATE __m512i _mm512_slli_epi16(__m512i x, unsigned n) {
  return bits_as<__m512i>(bits_as<Uint16x32>(x) << static_cast<uint16_t>(n));
}
SENTFAST_EMULATE __m512i _mm512_srli_epi16(__m512i x, unsigned n) {
  return bits_as<__m512i>(bits_as<Uint16x32>(x) >> static_cast<uint16_t>(n));
}
SENTFAST_EMULATE __m512i _mm512_srai_epi16(__m512i x, unsigned n) {
  return bits_as<__m512i>(bits_as<Int16x32>(x) >> static_cast<int16_t>(n));
}
SENTFAST_EMULATE __m512i _mm512_slli_epi32(__m512i x, unsigned n) {
  return bits_as<__m512i>(bits_as<Uint32x16>(x) << n);
}
SENTFAST_EMULATE __m512i _mm512_srli_epi32(__m512i x, unsigned n) {
  return bits_as<__m512i>(bits_as<Uint32x16>(x) >> n);
}
SENTFAST_EMULATE __m512i _mm512_slli_epi64(__m512i x, unsigned n) {
  return bits_as<__m512i>(bits_as<Uint64x8>(x) << uint64_t{n});
}
SENTFAST_EMULATE __m512i _mm512_srli_epi64(__m512i x, unsigned n) {
  return bits_as<__m512i>(bits_as<Uint64x8>(x) >> uint64_t{n});
}
SENTFAST_EMULATE __m512i _mm512_mul_epu32(__m512i a, __m512i b) {
  const Uint64x8 low = Uint64x8{} + 0xffffffffu;
  return bits_as<__m512i>((bits_as<Uint64x8>(a) & low) * (bits_as<Uint64x8>(b) & low));
}
SENTFAST_EMULATE __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  const auto x = bits_as<Int16x32>(a), y = bits_as<Int16x32>(b);
  Int32x16 sum;
  for (int i = 0; i < 16; ++i) sum[i] = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return bits_as<__m512i>(sum);
}
SENTFAST_EMULATE __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) {
  uint8_t x[64];
  int8_t y[64];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  Int16x32 sum;
  for (int i = 0; i < 32; ++i) {
    const int both = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
    sum[i] = static_cast<int16_t>(both > 32767 ? 32767 : both < -32768 ? -32768 : both);
  }
  return bits_as<__m512i>(sum);
}

// ---- from one type to another ----

SENTFAST_EMULATE __m512 _mm512_cvtepi32_ps(__m512i x) {
  return bits_as<__m512>(__builtin_convertvector(bits_as<Int32x16>(x), __m512));
}
SENTFAST_EMULATE __m512d _mm512_cvtps_pd(__m256 x) {
  __m512d y;
  for (int i = 0; i < 8; ++i) y[i] = static_cast<double>(x[i]);
  return y;
}
SENTFAST_EMULATE __m512i _mm512_cvtepu16_epi32(__m256i x) {
  uint16_t from[16];
  std::memcpy(from, &x, sizeof(x));
  Uint32x16 y;
  for (int i = 0; i < 16; ++i) y[i] = from[i];
  return bits_as<__m512i>(y);
}
SENTFAST_EMULATE __m256i _mm512_cvtepi32_epi16(__m512i x) {
  const auto from = bits_as<Uint32x16>(x);
  uint16_t y[16];
  for (int i = 0; i < 16; ++i) y[i] = static_cast<uint16_t>(from[i]);
  return bits_as<__m256i>(y);
}
SENTFAST_EMULATE __m512 _mm512_cvtph_ps(__m256i x) {
  return joined(_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
}
SENTFAST_EMULATE __m256i _mm512_cvtps_ph(__m512 x, int) {
  const Halves halves = bits_as<Halves>(x);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves.high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(halves.low, _MM_FROUND_TO_NEAREST_INT));
}

// ---- bfloat16: the instructions take subnormal numbers for zero ----

SENTFAST_EMULATE float no_subnormal(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

SENTFAST_EMULATE __m256i _mm512_cvtneps_pbh(__m512 x) {
  uint16_t y[16];
  for (int i = 0; i < 16; ++i) {
    const auto bits = bits_as<uint32_t>(no_subnormal(x[i]));
    const bool nan = x[i] != x[i];
    y[i] = static_cast<uint16_t>((nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  }
  return bits_as<__m256i>(y);
}
template <class Pairs>
SENTFAST_EMULATE __m512 _mm512_dpbf16_ps(__m512 sum, Pairs a, Pairs b) {
  const auto x = bits_as<Uint32x16>(a), y = bits_as<Uint32x16>(b);
  const auto product = [](uint32_t p, uint32_t q, float to) {
    return no_subnormal(std::fma(no_subnormal(bits_as<float>(p)), no_subnormal(bits_as<float>(q)), no_subnormal(to)));
  };
  for (int i = 0; i < 16; ++i) {
    sum[i] = product(x[i] << 16, y[i] << 16, product(x[i] & 0xffff0000u, y[i] & 0xffff0000u, sum[i]));
  }
  return sum;
}

}  // namespace sentfast::cpu
