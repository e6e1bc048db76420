// Vec of eight floats in AVX2, FMA and F16C.

struct Vec {
  static constexpr int lanes = 8;
  static constexpr int tile_vectors = 2;
  static constexpr int tile_rows = 6;
  __m256 v;

  using Mask = __m256;  // all bits of a lane

  static Vec fill(float x) { return {_mm256_set1_ps(x)}; }
  static Vec zero() { return {_mm256_setzero_ps()}; }

  static __m256i lane_mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m128i load_half(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m128i load_half(const uint16_t* p, int n) {
    alignas(16) uint16_t lane[8] = {};
    for (int i = 0; i < n; ++i) lane[i] = p[i];
    return _mm_load_si128(reinterpret_cast<const __m128i*>(lane));
  }
  static Vec widen_bf16(__m128i x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))}; }
  __m128i narrow_bf16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
  }
  __m128i narrow_f16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) { return widen_bf16(load_half(&p->bits)); }
  static Vec load(const Float16* p) { return {_mm256_cvtph_ps(load_half(&p->bits))}; }
  static Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, lane_mask(n))}; }
  static Vec load(const BFloat16* p, int n) { return widen_bf16(load_half(&p->bits, n)); }
  static Vec load(const Float16* p, int n) { return {_mm256_cvtph_ps(load_half(&p->bits, n))}; }

  static void store_half(uint16_t* p, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x); }
  static void store_half(uint16_t* p, __m128i x, int n) {
    alignas(16) uint16_t lane[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(lane), x);
    for (int i = 0; i < n; ++i) p[i] = lane[i];
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BFloat16* p) const { store_half(&p->bits, narrow_bf16()); }
  void store(Float16* p) const { store_half(&p->bits, narrow_f16()); }
  // In pieces: on Zen 3 a store with a mask takes far longer than three without.
  void store(float* p, int n) const {
    if (n >= lanes) return store(p);
    __m128 x = _mm256_castps256_ps128(v);
    if (n & 4) {
      _mm_storeu_ps(p, x);
      x = _mm256_extractf128_ps(v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), x);
      x = _mm_movehl_ps(x, x);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, x);
  }
  void store(BFloat16* p, int n) const { store_half(&p->bits, narrow_bf16(), n); }
  void store(Float16* p, int n) const { store_half(&p->bits, narrow_f16(), n); }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  // a * b + c
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  // -1, 0 or 1; 0 for NaN, as torch.sign.
  static Vec sign(Vec a) {
    const __m256 one = _mm256_set1_ps(1.0f), none = _mm256_setzero_ps();
    const __m256 plus = _mm256_and_ps(_mm256_cmp_ps(a.v, none, _CMP_GT_OQ), one);
    const __m256 minus = _mm256_and_ps(_mm256_cmp_ps(a.v, none, _CMP_LT_OQ), one);
    return {_mm256_sub_ps(plus, minus)};
  }
  // Lanes where x replaces best as a maximum: x is larger, or the first NaN.
  static Mask above(Vec x, Vec best) {
    return _mm256_and_ps(_mm256_cmp_ps(x.v, best.v, _CMP_NLE_UQ), _mm256_cmp_ps(best.v, best.v, _CMP_ORD_Q));
  }
  // b where either is NaN.
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  static Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // x * 2^n for whole n from -126 to 127.
  static Vec scale_by_power(Vec x, Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
  }
  // The two halves of each Word as floats.
  static Vec low_half(Vec x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 16))}; }
  static Vec high_half(Vec x) {
    return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(-65536)))};
  }
  static Mask unordered(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q); }
  static Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
  static unsigned bits(Mask m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
  static Mask first_lanes(int n) { return _mm256_castsi256_ps(lane_mask(n)); }
  static Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m)}; }

  using Index = __m256i;  // an int32 per lane
  static Index load_index(const int32_t* p, int n) {
    return n == lanes ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                      : _mm256_maskload_epi32(p, lane_mask(n));
  }
  static void store_index(Index x, int32_t* p, int n) {
    if (n == lanes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
    } else {
      _mm256_maskstore_epi32(p, lane_mask(n), x);
    }
  }
  static Index select_index(Mask m, int32_t value, Index old) {
    return _mm256_blendv_epi8(old, _mm256_set1_epi32(value), _mm256_castps_si256(m));
  }
  static Mask equal(Index x, int32_t value) {
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(x, _mm256_set1_epi32(value)));
  }

  using Bits = __m256i;  // a uint32 per lane
  static Bits fill_bits(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static Bits count_from(uint32_t first) {
    return _mm256_add_epi32(fill_bits(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Bits exclusive_or(Bits a, Bits b) { return _mm256_xor_si256(a, b); }
  // The halves of the 64-bit products.
  static void multiply(Bits a, Bits b, Bits* high, Bits* low) {
    const __m256i even = _mm256_mul_epu32(a, b);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  }
  static Mask reaches(Bits a, Bits limit) {
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(a, limit), a));
  }

  float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  // Any lane's number where one is NaN.
  float highest() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  // Rows become columns. Pairs and quadruples of lanes change places first, then the halves of each row.
  static void transpose(Vec (&x)[8]) {
    __m256 y[8], z[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      y[2 * i] = _mm256_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v);
      y[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      z[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
      z[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
      z[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
      z[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i].v = _mm256_permute2f128_ps(z[i], z[i + 4], 0x20);
      x[i + 4].v = _mm256_permute2f128_ps(z[i], z[i + 4], 0x31);
    }
  }
  static Vec broadcast(const Word* p) {
    return {_mm256_broadcastss_ps(_mm_load_ss(reinterpret_cast<const AliasedFloat*>(p)))};
  }
};
