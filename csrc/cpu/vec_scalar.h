// Vec without vector instructions: eight floats in a plain array. The compiler may use what the baseline has.
#include <cmath>
#include <cstring>

#define SENTFAST_PLAIN

struct Vec {
  static constexpr int lanes = 8;
  static constexpr int tile_vectors = 1;  // width of the matrix tile, in vectors
  static constexpr int tile_rows = 2;
  float v[lanes];

  using Mask = unsigned;  // bit per lane

  static Vec fill(float x) {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = x;
    return r;
  }
  static Vec zero() { return fill(0.0f); }

  static float widen(float x) { return x; }
  static float widen(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float r;
    std::memcpy(&r, &bits, 4);
    return r;
  }
  static float widen(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t exponent = (x.bits >> 10) & 0x1f, mantissa = x.bits & 0x3ff;
    if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24 is exact
      const float r = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
      return sign != 0 ? -r : r;
    }
    const uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
    float r;
    std::memcpy(&r, &bits, 4);
    return r;
  }
  static void narrow(float x, float* p) { *p = x; }
  static void narrow(float x, BFloat16* p) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) {
      p->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);  // stays NaN whatever its payload
    } else {
      p->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
  }
  static void narrow(float x, Float16* p) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const float magnitude = std::fabs(x);
    uint32_t half;
    if (x != x) {
      half = 0x7e00u;
    } else if (magnitude >= 65520.0f) {
      half = 0x7c00u;
    } else if (magnitude < 6.103515625e-5f) {  // subnormal: round to a multiple of 2^-24
      half = static_cast<uint32_t>(std::nearbyintf(magnitude * 16777216.0f));
    } else {
      const uint32_t m = bits & 0x7fffffffu;
      half = (m + 0xfffu + ((m >> 13) & 1u) - (112u << 23)) >> 13;
    }
    p->bits = static_cast<uint16_t>(sign | half);
  }

  template <class T>
  static Vec load(const T* p) {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = widen(p[i]);
    return r;
  }
  template <class T>
  static Vec load(const T* p, int n) {
    Vec r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = widen(p[i]);
    return r;
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < lanes; ++i) narrow(v[i], p + i);
  }
  template <class T>
  void store(T* p, int n) const {
    for (int i = 0; i < n; ++i) narrow(v[i], p + i);
  }

  friend Vec operator+(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a.v[i] += b.v[i];
    return a;
  }
  friend Vec operator-(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a.v[i] -= b.v[i];
    return a;
  }
  friend Vec operator*(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a.v[i] *= b.v[i];
    return a;
  }
  friend Vec operator/(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a.v[i] /= b.v[i];
    return a;
  }
  // a * b + c
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static Vec abs(Vec a) {
    for (int i = 0; i < lanes; ++i) a.v[i] = std::fabs(a.v[i]);
    return a;
  }
  // -1, 0 or 1; 0 for NaN, as torch.sign.
  static Vec sign(Vec a) {
    for (int i = 0; i < lanes; ++i) a.v[i] = static_cast<float>((a.v[i] > 0) - (a.v[i] < 0));
    return a;
  }
  // Lanes where x replaces best as a maximum: x is larger, or the first NaN.
  static Mask above(Vec x, Vec best) {
    Mask m = 0;
    for (int i = 0; i < lanes; ++i) {
      m |= static_cast<Mask>(!(x.v[i] <= best.v[i]) && best.v[i] == best.v[i]) << i;
    }
    return m;
  }
  // b where either is NaN.
  static Vec max(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return b;
  }
  static Vec min(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return b;
  }
  static Vec round(Vec a) {
    for (int i = 0; i < lanes; ++i) a.v[i] = std::nearbyintf(a.v[i]);
    return a;
  }
  // x * 2^n for whole n from -126 to 127.
  static Vec scale_by_power(Vec x, Vec n) {
    for (int i = 0; i < lanes; ++i) {
      const int32_t exponent = n.v[i] == n.v[i] ? static_cast<int32_t>(n.v[i]) : 0;
      const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
      float power;
      std::memcpy(&power, &bits, 4);
      x.v[i] *= power;
    }
    return x;
  }
  // The two halves of each Word as floats.
  static Vec low_half(Vec x) {
    for (int i = 0; i < lanes; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &x.v[i], 4);
      bits <<= 16;
      std::memcpy(&x.v[i], &bits, 4);
    }
    return x;
  }
  static Vec high_half(Vec x) {
    for (int i = 0; i < lanes; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &x.v[i], 4);
      bits &= 0xffff0000u;
      std::memcpy(&x.v[i], &bits, 4);
    }
    return x;
  }
  static Mask unordered(Vec a, Vec b) {
    Mask m = 0;
    for (int i = 0; i < lanes; ++i) m |= static_cast<Mask>(a.v[i] != a.v[i] || b.v[i] != b.v[i]) << i;
    return m;
  }
  static Mask either(Mask a, Mask b) { return a | b; }
  static bool any(Mask m) { return m != 0; }
  static unsigned bits(Mask m) { return m; }
  static Mask first_lanes(int n) { return (1u << n) - 1u; }
  static Vec select(Mask m, Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) b.v[i] = (m >> i) & 1u ? a.v[i] : b.v[i];
    return b;
  }

  struct Index {  // an int32 per lane
    int32_t v[lanes];
  };
  static Index load_index(const int32_t* p, int n) {
    Index x = {};
    for (int i = 0; i < n; ++i) x.v[i] = p[i];
    return x;
  }
  static void store_index(Index x, int32_t* p, int n) {
    for (int i = 0; i < n; ++i) p[i] = x.v[i];
  }
  static Index select_index(Mask m, int32_t value, Index old) {
    for (int i = 0; i < lanes; ++i) old.v[i] = (m >> i) & 1u ? value : old.v[i];
    return old;
  }
  static Mask equal(Index x, int32_t value) {
    Mask m = 0;
    for (int i = 0; i < lanes; ++i) m |= static_cast<Mask>(x.v[i] == value) << i;
    return m;
  }

  struct Bits {  // a uint32 per lane
    uint32_t v[lanes];
  };
  static Bits fill_bits(uint32_t x) {
    Bits r;
    for (int i = 0; i < lanes; ++i) r.v[i] = x;
    return r;
  }
  static Bits count_from(uint32_t first) {
    Bits r;
    for (int i = 0; i < lanes; ++i) r.v[i] = first + static_cast<uint32_t>(i);
    return r;
  }
  static Bits exclusive_or(Bits a, Bits b) {
    for (int i = 0; i < lanes; ++i) a.v[i] ^= b.v[i];
    return a;
  }
  // The halves of the 64-bit products.
  static void multiply(Bits a, Bits b, Bits* high, Bits* low) {
    for (int i = 0; i < lanes; ++i) {
      const uint64_t product = static_cast<uint64_t>(a.v[i]) * b.v[i];
      high->v[i] = static_cast<uint32_t>(product >> 32);
      low->v[i] = static_cast<uint32_t>(product);
    }
  }
  static Mask reaches(Bits a, Bits limit) {
    Mask m = 0;
    for (int i = 0; i < lanes; ++i) m |= static_cast<Mask>(a.v[i] >= limit.v[i]) << i;
    return m;
  }

  float sum() const { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
  // Any lane's number where one is NaN.
  float highest() const {
    float found = v[0];
    for (int i = 1; i < lanes; ++i) found = v[i] > found ? v[i] : found;
    return found;
  }
  // Rows become columns.
  static void transpose(Vec (&x)[lanes]) {
    for (int i = 0; i < lanes; ++i) {
      for (int j = 0; j < i; ++j) {
        const float kept = x[i].v[j];
        x[i].v[j] = x[j].v[i];
        x[j].v[i] = kept;
      }
    }
  }
  static Vec broadcast(const Word* p) {
    const uint32_t bits = *p;
    float x;
    std::memcpy(&x, &bits, 4);
    return fill(x);
  }
};
