// Vec of four floats in NEON (Armv8.0-A, 64 bits).
#define SENTFAST_NEON

struct Vec {
  static constexpr int lanes = 4;
  static constexpr int tile_vectors = 4;  // with tile_rows sums of each, 24 of the 32 registers
  static constexpr int tile_rows = 6;
  float32x4_t v;

  using Mask = uint32x4_t;  // all bits of a lane

  static Vec fill(float x) { return {vdupq_n_f32(x)}; }
  static Vec zero() { return fill(0.0f); }

  static uint32x4_t count() {
    const uint32_t lane[4] = {0, 1, 2, 3};
    return vld1q_u32(lane);
  }
  static Mask first_lanes(int n) { return vcltq_u32(count(), vdupq_n_u32(static_cast<uint32_t>(n))); }

  // Reads n elements and no further; the other lanes are zero.
  template <class T>
  static void copy(T* to, const T* from, int n) {
    for (int i = 0; i < n; ++i) to[i] = from[i];
  }
  static Vec widen_bf16(uint16x4_t x) { return {vreinterpretq_f32_u32(vshll_n_u16(x, 16))}; }
  static Vec widen_f16(uint16x4_t x) { return {vcvt_f32_f16(vreinterpret_f16_u16(x))}; }
  uint16x4_t narrow_bf16() const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
  }
  uint16x4_t narrow_f16() const { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }

  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load(const BFloat16* p) { return widen_bf16(vld1_u16(&p->bits)); }
  static Vec load(const Float16* p) { return widen_f16(vld1_u16(&p->bits)); }
  static Vec load(const float* p, int n) {
    float lane[4] = {};
    copy(lane, p, n);
    return {vld1q_f32(lane)};
  }
  static uint16x4_t load_half(const uint16_t* p, int n) {
    uint16_t lane[4] = {};
    copy(lane, p, n);
    return vld1_u16(lane);
  }
  static Vec load(const BFloat16* p, int n) { return widen_bf16(load_half(&p->bits, n)); }
  static Vec load(const Float16* p, int n) { return widen_f16(load_half(&p->bits, n)); }

  void store(float* p) const { vst1q_f32(p, v); }
  void store(BFloat16* p) const { vst1_u16(&p->bits, narrow_bf16()); }
  void store(Float16* p) const { vst1_u16(&p->bits, narrow_f16()); }
  void store(float* p, int n) const {
    float lane[4];
    vst1q_f32(lane, v);
    copy(p, lane, n);
  }
  static void store_half(uint16_t* p, uint16x4_t x, int n) {
    uint16_t lane[4];
    vst1_u16(lane, x);
    copy(p, lane, n);
  }
  void store(BFloat16* p, int n) const { store_half(&p->bits, narrow_bf16(), n); }
  void store(Float16* p, int n) const { store_half(&p->bits, narrow_f16(), n); }

  friend Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
  // a * b + c
  static Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  static Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
  // -1, 0 or 1; 0 for NaN, as torch.sign.
  static Vec sign(Vec a) {
    const uint32x4_t one = vreinterpretq_u32_f32(vdupq_n_f32(1.0f));
    const float32x4_t plus = vreinterpretq_f32_u32(vandq_u32(vcgtzq_f32(a.v), one));
    const float32x4_t minus = vreinterpretq_f32_u32(vandq_u32(vcltzq_f32(a.v), one));
    return {vsubq_f32(plus, minus)};
  }
  // Lanes where x replaces best as a maximum: x is larger, or the first NaN.
  static Mask above(Vec x, Vec best) { return vbicq_u32(vceqq_f32(best.v, best.v), vcleq_f32(x.v, best.v)); }
  // b where either is NaN; NEON's own maximum and minimum would give NaN.
  static Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
  static Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
  // x * 2^n for whole n from -126 to 127.
  static Vec scale_by_power(Vec x, Vec n) {
    const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n.v), vdupq_n_s32(127));
    return {vmulq_f32(x.v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)))};
  }
  // The two halves of each Word as floats.
  static Vec low_half(Vec x) { return {vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(x.v), 16))}; }
  static Vec high_half(Vec x) {
    return {vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x.v), vdupq_n_u32(0xffff0000u)))};
  }
  static Mask unordered(Vec a, Vec b) { return vmvnq_u32(vandq_u32(vceqq_f32(a.v, a.v), vceqq_f32(b.v, b.v))); }
  static Mask either(Mask a, Mask b) { return vorrq_u32(a, b); }
  static bool any(Mask m) { return vmaxvq_u32(m) != 0; }
  static unsigned bits(Mask m) {
    const uint32_t bit[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(m, vld1q_u32(bit)));
  }
  static Vec select(Mask m, Vec a, Vec b) { return {vbslq_f32(m, a.v, b.v)}; }

  using Index = int32x4_t;  // an int32 per lane
  static Index load_index(const int32_t* p, int n) {
    int32_t lane[4] = {};
    copy(lane, p, n);
    return vld1q_s32(lane);
  }
  static void store_index(Index x, int32_t* p, int n) {
    int32_t lane[4];
    vst1q_s32(lane, x);
    copy(p, lane, n);
  }
  static Index select_index(Mask m, int32_t value, Index old) { return vbslq_s32(m, vdupq_n_s32(value), old); }
  static Mask equal(Index x, int32_t value) { return vceqq_s32(x, vdupq_n_s32(value)); }

  using Bits = uint32x4_t;  // a uint32 per lane
  static Bits fill_bits(uint32_t x) { return vdupq_n_u32(x); }
  static Bits count_from(uint32_t first) { return vaddq_u32(fill_bits(first), count()); }
  static Bits exclusive_or(Bits a, Bits b) { return veorq_u32(a, b); }
  // The halves of the 64-bit products.
  static void multiply(Bits a, Bits b, Bits* high, Bits* low) {
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vget_low_u32(b)));
    const uint32x4_t last = vreinterpretq_u32_u64(vmull_high_u32(a, b));
    *high = vuzp2q_u32(first, last);
    *low = vuzp1q_u32(first, last);
  }
  static Mask reaches(Bits a, Bits limit) { return vcgeq_u32(a, limit); }

  float sum() const { return vaddvq_f32(v); }
  // Any lane's number where one is NaN.
  float highest() const { return vmaxnmvq_f32(v); }
  // Rows become columns.
  static void transpose(Vec (&x)[4]) {
    const float32x4_t a = vzip1q_f32(x[0].v, x[2].v), b = vzip2q_f32(x[0].v, x[2].v);
    const float32x4_t c = vzip1q_f32(x[1].v, x[3].v), d = vzip2q_f32(x[1].v, x[3].v);
    x[0].v = vzip1q_f32(a, c);
    x[1].v = vzip2q_f32(a, c);
    x[2].v = vzip1q_f32(b, d);
    x[3].v = vzip2q_f32(b, d);
  }
  static Vec broadcast(const Word* p) { return {vld1q_dup_f32(reinterpret_cast<const AliasedFloat*>(p))}; }
};
