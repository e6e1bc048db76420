// Vec of sixteen floats in AVX-512 (F, BW, DQ, VL).

struct Vec {
  static constexpr int lanes = 16;
  static constexpr int tile_vectors = 4;
  static constexpr int tile_rows = 6;
  __m512 v;

  using Mask = __mmask16;

  static Vec fill(float x) { return {_mm512_set1_ps(x)}; }
  static Vec zero() { return {_mm512_setzero_ps()}; }

  static __mmask16 lane_mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static __m256i load_half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m256i load_half(const void* p, int n) { return _mm256_maskz_loadu_epi16(lane_mask(n), p); }
  static Vec widen_bf16(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
#ifdef __AVX512BF16__
  __m256i narrow_bf16() const { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
#else
  __m256i narrow_bf16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
  }
#endif
  __m256i narrow_f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) { return widen_bf16(load_half(p)); }
  static Vec load(const Float16* p) { return {_mm512_cvtph_ps(load_half(p))}; }
  static Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lane_mask(n), p)}; }
  static Vec load(const BFloat16* p, int n) { return widen_bf16(load_half(p, n)); }
  static Vec load(const Float16* p, int n) { return {_mm512_cvtph_ps(load_half(p, n))}; }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16()); }
  void store(Float16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16()); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, lane_mask(n), v); }
  void store(BFloat16* p, int n) const { _mm256_mask_storeu_epi16(p, lane_mask(n), narrow_bf16()); }
  void store(Float16* p, int n) const { _mm256_mask_storeu_epi16(p, lane_mask(n), narrow_f16()); }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  // a * b + c
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
  // -1, 0 or 1; 0 for NaN, as torch.sign.
  static Vec sign(Vec a) {
    const __m512 none = _mm512_setzero_ps();
    const __m512 plus = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, none, _CMP_GT_OQ), _mm512_set1_ps(1.0f));
    return {_mm512_mask_mov_ps(plus, _mm512_cmp_ps_mask(a.v, none, _CMP_LT_OQ), _mm512_set1_ps(-1.0f))};
  }
  // Lanes where x replaces best as a maximum: x is larger, or the first NaN.
  static Mask above(Vec x, Vec best) {
    return _mm512_cmp_ps_mask(x.v, best.v, _CMP_NLE_UQ) & _mm512_cmp_ps_mask(best.v, best.v, _CMP_ORD_Q);
  }
  // b where either is NaN.
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  static Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // x * 2^n for whole n from -126 to 127.
  static Vec scale_by_power(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
  // The two halves of each Word as floats.
  static Vec low_half(Vec x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 16))}; }
  static Vec high_half(Vec x) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(-65536)))};
  }
  static Mask unordered(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q); }
  static Mask either(Mask a, Mask b) { return a | b; }
  static bool any(Mask m) { return m != 0; }
  static unsigned bits(Mask m) { return m; }
  static Mask first_lanes(int n) { return lane_mask(n); }
  static Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }

  using Index = __m512i;  // an int32 per lane
  static Index load_index(const int32_t* p, int n) { return _mm512_maskz_loadu_epi32(lane_mask(n), p); }
  static void store_index(Index x, int32_t* p, int n) { _mm512_mask_storeu_epi32(p, lane_mask(n), x); }
  static Index select_index(Mask m, int32_t value, Index old) { return _mm512_mask_set1_epi32(old, m, value); }
  static Mask equal(Index x, int32_t value) { return _mm512_cmpeq_epi32_mask(x, _mm512_set1_epi32(value)); }

  using Bits = __m512i;  // a uint32 per lane
  static Bits fill_bits(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static Bits count_from(uint32_t first) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(fill_bits(first), lane);
  }
  static Bits exclusive_or(Bits a, Bits b) { return _mm512_xor_si512(a, b); }
  // The halves of the 64-bit products.
  static void multiply(Bits a, Bits b, Bits* high, Bits* low) {
    const __m512i even = _mm512_mul_epu32(a, b);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
    *high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    *low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  }
  static Mask reaches(Bits a, Bits limit) { return _mm512_cmpge_epu32_mask(a, limit); }

  float sum() const {
    const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  // Any lane's number where one is NaN.
  float highest() const {
    const __m256 x = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
  }
  // Rows become columns. Pairs and quadruples of lanes change places first, then the four quarters of each row.
  static void transpose(Vec (&x)[16]) {
    __m512 y[16], z[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = _mm512_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v);
      y[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      const auto low = [](__m512 a, __m512 b) { return _mm512_shuffle_ps(a, b, 0x44); };
      const auto high = [](__m512 a, __m512 b) { return _mm512_shuffle_ps(a, b, 0xee); };
      z[i] = low(y[i], y[i + 2]);
      z[i + 1] = high(y[i], y[i + 2]);
      z[i + 2] = low(y[i + 1], y[i + 3]);
      z[i + 3] = high(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // z[4 g + i] has columns i, i + 4, i + 8, i + 12 of rows 4 g to 4 g + 3
      const __m512 a = _mm512_shuffle_f32x4(z[i], z[i + 4], 0x88), b = _mm512_shuffle_f32x4(z[i], z[i + 4], 0xdd);
      const __m512 c = _mm512_shuffle_f32x4(z[i + 8], z[i + 12], 0x88);
      const __m512 d = _mm512_shuffle_f32x4(z[i + 8], z[i + 12], 0xdd);
      x[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
      x[i + 4].v = _mm512_shuffle_f32x4(b, d, 0x88);
      x[i + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
      x[i + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }
  static Vec broadcast(const Word* p) {
    return {_mm512_broadcastss_ps(_mm_load_ss(reinterpret_cast<const AliasedFloat*>(p)))};
  }
};
