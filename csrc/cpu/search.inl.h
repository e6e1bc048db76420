// Search: quantised rows, and the first pass over a panel. Exact scores are in search_exact.inl.h.

namespace search {

// The nearest whole numbers of what is below 2^51.
SENTFAST_INLINE inline Wide nearest(const Wide& x) {
  const Wide whole = Wide::fill(0x1.8p52);
  return (x + whole) - whole;
}

// The first `count` of eight elements.
template <class T>
SENTFAST_INLINE inline void put_first(const T (&from)[kLanes], T* to, int64_t count) {
  if (count == kLanes) {
    __builtin_memcpy(to, from, sizeof from);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

// Each writes up to eight codes of numbers to place d, and returns their values.
struct Int8Codes {
  int8_t* out;
  double inverse, most;
  SENTFAST_INLINE Wide put(const Wide& x, int64_t d, int64_t count) const {
    typedef int32_t Whole __attribute__((vector_size(4 * kPartLanes)));
    typedef int8_t Codes __attribute__((vector_size(kPartLanes)));
    const Wide code = Wide::max(Wide::fill(-most), Wide::min(Wide::fill(most), nearest(x * Wide::fill(inverse))));
    int8_t bytes[kLanes];
#pragma GCC unroll 4
    for (int i = 0; i < Wide::parts; ++i) {
      const Codes part = __builtin_convertvector(__builtin_convertvector(code.part[i], Whole), Codes);
      __builtin_memcpy(bytes + i * kPartLanes, &part, sizeof part);
    }
    put_first(bytes, out + d, count);
    return code;
  }
};
struct Bf16Codes {
  uint16_t* out;
  SENTFAST_INLINE Wide put(const Wide& x, int64_t d, int64_t count) const {
    typedef uint32_t Bits __attribute__((vector_size(4 * kPartLanes)));
    typedef uint16_t Halves __attribute__((vector_size(2 * kPartLanes)));
    uint16_t halves[kLanes];
    const Wide code = Wide::of([&](int i) SENTFAST_INLINE {
      const NarrowPart near = __builtin_convertvector(x.part[i], NarrowPart);
      Bits bits;
      __builtin_memcpy(&bits, &near, sizeof bits);
      bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      const Halves part = __builtin_convertvector(bits, Halves);
      __builtin_memcpy(halves + i * kPartLanes, &part, sizeof part);
      bits <<= 16;
      NarrowPart value;
      __builtin_memcpy(&value, &bits, sizeof bits);
      return __builtin_convertvector(value, Part);
    });
    put_first(halves, out + d, count);
    return code;
  }
};
struct Fp32Codes {
  float* out;
  SENTFAST_INLINE Wide put(const Wide& x, int64_t d, int64_t count) const {
    float floats[kLanes];
    const Wide code = Wide::of([&](int i) SENTFAST_INLINE {
      const NarrowPart near = __builtin_convertvector(x.part[i], NarrowPart);
      __builtin_memcpy(floats + i * kPartLanes, &near, sizeof near);
      return __builtin_convertvector(near, Part);
    });
    put_first(floats, out + d, count);
    return code;
  }
};

template <SearchFormat Format>
inline SearchCodes quantize(const float* row, int64_t dim, double divisor, const float* center, double least,
                            double most, uint32_t* codes) {
  constexpr int64_t group = kSearchGroup[Format];
  const int64_t places = (dim + group - 1) / group * group;
  const double unit = 1 / divisor;
  const auto each = [&](auto f) SENTFAST_INLINE {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t n = dim - d;
      Wide x = (n < kLanes ? widen(row + d, n) : widen(row + d)) * Wide::fill(unit);
      if (center != nullptr) x = x - (n < kLanes ? widen(center + d, n) : widen(center + d));
      f(d, x);
    }
  };
  double scale = 1;
  Wide residual = {}, square = {}, sum = {};
  const auto write = [&](auto format) SENTFAST_INLINE {
    each([&](int64_t d, const Wide& x) SENTFAST_INLINE {
      const Wide code = format.put(x, d, places - d < kLanes ? places - d : kLanes);
      const Wide off = x - code * Wide::fill(scale);
      residual = residual + off * off;
      square = square + code * code;
      sum = sum + code;
    });
  };
  if constexpr (Format == kSearchInt8) {
    Wide largest = {};
    each([&](int64_t, const Wide& x) SENTFAST_INLINE {
      const Wide size = Wide::max(Wide{} - x, x);
      largest = Wide::max(size, largest);
    });
    double size = 0;
    for (int i = 0; i < kLanes; ++i) size = largest[i] > size ? largest[i] : size;
    // The scale is kept as a float, so the codes are those of the float.
    scale = static_cast<float>(size / most);
    if (scale < least) scale = static_cast<float>(least);
    write(Int8Codes{reinterpret_cast<int8_t*>(codes), scale > 0 ? 1 / scale : 0, most});
  } else if constexpr (Format == kSearchBf16) {
    write(Bf16Codes{reinterpret_cast<uint16_t*>(codes)});
  } else {
    write(Fp32Codes{reinterpret_cast<float*>(codes)});
  }
  // Rounded up, so that what is computed with them stays a bound.
  constexpr double up = 1 + 0x1p-20;
  return {scale, up * __builtin_sqrt(total(residual)), up * scale * __builtin_sqrt(total(square)),
          Format == kSearchInt8 ? static_cast<int32_t>(total(sum)) : 0};
}

inline void panel(const uint32_t* from, int64_t stride, int64_t rows, int64_t words, uint32_t flip, uint32_t* panel) {
  gemm::turn(from, stride, rows, words, kSearchPanel, panel, kSearchPanel);
  if (flip == 0) return;
  for (int64_t i = 0; i < words * kSearchPanel; ++i) panel[i] ^= flip;
}

// Four products of a query's signed codes and a row's codes plus 128, added to an int32. Without VNNI the instruction
// adds two of them in 16 bits, where 2 * 63 * 255 has room and 2 * 127 * 255 has not.
struct Int8Step {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  static constexpr int query_codes = 63;
#else
  static constexpr int query_codes = 127;
#endif
#if defined(__AVX512F__)
  using Words = __m512i;
  static SENTFAST_INLINE Words load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static SENTFAST_INLINE Words fill(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static SENTFAST_INLINE Vec value(Words sum) { return {_mm512_cvtepi32_ps(sum)}; }
#elif defined(__AVX2__)
  using Words = __m256i;
  static SENTFAST_INLINE Words load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static SENTFAST_INLINE Words fill(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static SENTFAST_INLINE Vec value(Words sum) { return {_mm256_cvtepi32_ps(sum)}; }
#elif defined(SENTFAST_NEON)
  using Words = uint32x4_t;
  static SENTFAST_INLINE Words load(const uint32_t* p) { return vld1q_u32(p); }
  static SENTFAST_INLINE Words fill(uint32_t x) { return vdupq_n_u32(x); }
  static SENTFAST_INLINE Vec value(Words sum) { return {vcvtq_f32_s32(vreinterpretq_s32_u32(sum))}; }
#else
  struct Words {
    uint32_t lane[Vec::lanes];
  };
  static Words load(const uint32_t* p) {
    Words x;
    for (int i = 0; i < Vec::lanes; ++i) x.lane[i] = p[i];
    return x;
  }
  static Words fill(uint32_t value) {
    Words x;
    for (int i = 0; i < Vec::lanes; ++i) x.lane[i] = value;
    return x;
  }
  static Vec value(Words sum) {
    Vec x;
    for (int i = 0; i < Vec::lanes; ++i) x.v[i] = static_cast<float>(static_cast<int32_t>(sum.lane[i]));
    return x;
  }
#endif

#if defined(__AVX512VNNI__)
  static SENTFAST_INLINE Words multiply_add(Words query, Words row, Words sum) {
    // GCC 12 takes the intrinsic for a call that may read memory, and stores every sum at every step.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(row), "v"(query));
    return sum;
  }
#elif defined(SENTFAST_EMULATED)  // by tests/native/avx512, which replaces intrinsics alone
  static SENTFAST_INLINE Words multiply_add(Words query, Words row, Words sum) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(row, query), _mm512_set1_epi16(1)));
  }
#elif defined(__AVX2__)
  static SENTFAST_INLINE Words multiply_add(Words query, Words row, Words sum) {
    // One piece, with one register for what lies between: GCC 12 moves intrinsics about until most sums of a tile go
    // through memory at every step.
    alignas(64) static constexpr int16_t ones[32] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                                     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    Words between;
    asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
        : "+v"(sum), "=&v"(between)
        : "v"(row), "v"(query), "m"(ones));
    return sum;
  }
#elif defined(SENTFAST_NEON)
  static SENTFAST_INLINE Words multiply_add(Words query, Words row, Words sum) {
    const int8x16_t codes = vreinterpretq_s8_u32(query);
    int32x4_t total = vreinterpretq_s32_u32(sum);
#if defined(__ARM_FEATURE_MATMUL_INT8)
    total = vusdotq_s32(total, vreinterpretq_u8_u32(row), codes);
#elif defined(__ARM_FEATURE_DOTPROD)
    // Of signed numbers only: the rows less 128, and 128 times the query's codes.
    const int8x16_t less = vreinterpretq_s8_u32(veorq_u32(row, vdupq_n_u32(0x80808080u)));
    total = vdotq_s32(vdotq_s32(vdotq_s32(total, less, codes), codes, vdupq_n_s8(64)), codes, vdupq_n_s8(64));
#else
    const uint8x16_t bytes = vreinterpretq_u8_u32(row);
    const int16x8_t query_low = vmovl_s8(vget_low_s8(codes)), query_high = vmovl_high_s8(codes);
    const int16x8_t row_low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
    const int16x8_t row_high = vreinterpretq_s16_u16(vmovl_high_u8(bytes));
    const auto products = [](int16x8_t a, int16x8_t b) SENTFAST_INLINE {  // the sums of each four, by pairs
      const int32x4_t first = vmull_s16(vget_low_s16(a), vget_low_s16(b)), last = vmull_high_s16(a, b);
      return vpaddq_s32(first, last);
    };
    total = vaddq_s32(total, vpaddq_s32(products(query_low, row_low), products(query_high, row_high)));
#endif
    return vreinterpretq_u32_s32(total);
  }
#else
  static Words multiply_add(Words query, Words row, Words sum) {
    for (int i = 0; i < Vec::lanes; ++i) {
      for (int shift = 0; shift < 32; shift += 8) {
        const auto code = static_cast<int8_t>(query.lane[i] >> shift);
        sum.lane[i] += static_cast<uint32_t>(code * static_cast<int32_t>((row.lane[i] >> shift) & 255));
      }
    }
    return sum;
  }
#endif
  static SENTFAST_INLINE Words start(const SearchScan& p, int64_t query) {
    return fill(static_cast<uint32_t>(p.start[query]));
  }
};

struct Fp32Step {
  using Words = Vec;
  static SENTFAST_INLINE Vec load(const uint32_t* p) { return Vec::load(reinterpret_cast<const AliasedFloat*>(p)); }
  static SENTFAST_INLINE Vec fill(uint32_t x) {
    float value;
    __builtin_memcpy(&value, &x, 4);
    return Vec::fill(value);
  }
  static SENTFAST_INLINE Vec multiply_add(Vec query, Vec row, Vec sum) { return Vec::fma(query, row, sum); }
  static SENTFAST_INLINE Vec value(Vec sum) { return sum; }
  static SENTFAST_INLINE Vec start(const SearchScan&, int64_t) { return Vec::zero(); }
};

// Two products of bf16, added to a float32.
struct Bf16Step : Fp32Step {
  static SENTFAST_INLINE Vec multiply_add(Vec query, Vec row, Vec sum) {
#if defined(__AVX512BF16__)
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(query.v), reinterpret_cast<__m512bh>(row.v))};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return {vbfdotq_f32(sum.v, vreinterpretq_bf16_f32(query.v), vreinterpretq_bf16_f32(row.v))};
#else
    return gemm::WideBFloat16Step::multiply_add(query, row, sum);
#endif
  }
};

constexpr int64_t kTileWidth = int64_t{Vec::tile_vectors} * Vec::lanes;  // columns

// The pairs of query q whose bounds exceed its limit, from their sums with the columns of a tile.
SENTFAST_INLINE inline SearchHit* choose(const SearchScan& p, int64_t q, int64_t column, const float* sums,
                                         SearchHit* hits) {
  const Vec norm = Vec::fill(p.norm[q]), error = Vec::fill(p.error[q]), center = Vec::fill(p.center[q]);
  const Vec tilt = Vec::fill(p.tilt[q]), limit = Vec::fill(p.limit[q]);
  uint64_t found = 0;
  Vec bounds[Vec::tile_vectors];
#pragma GCC unroll 8
  for (int j = 0; j < Vec::tile_vectors; ++j) {
    const float* first = p.factors + column + j * Vec::lanes;
    const auto factor = [&](int n) SENTFAST_INLINE { return Vec::load(first + n * kSearchPanel); };
    Vec bound = Vec::fma(tilt, factor(kSearchTilt), error * factor(kSearchHeight));
    bound = Vec::fma(norm, factor(kSearchResidual), bound);
    bound = Vec::fma(center, factor(kSearchNorm), bound);
    if (p.square != nullptr) bound = Vec::fma(Vec::fill(p.square[q]), factor(kSearchSquare), bound);
    bound = Vec::fma(Vec::load(sums + j * Vec::lanes), factor(kSearchScale), bound);
    found |= static_cast<uint64_t>(Vec::bits(Vec::above(bound, limit))) << (j * Vec::lanes);
    bounds[j] = bound;
  }
  if (found == 0) return hits;
  float bound[kTileWidth];
#pragma GCC unroll 8
  for (int j = 0; j < Vec::tile_vectors; ++j) bounds[j].store(bound + j * Vec::lanes);
  for (; found != 0; found &= found - 1) {
    const int at = __builtin_ctzll(found);
    *hits++ = {p.number[q], static_cast<uint32_t>(p.row + column + at), bound[at]};
  }
  return hits;
}

// R queries from `first` on against the columns of a tile from `column` on.
template <class Step, int R>
SENTFAST_INLINE inline SearchHit* scan_tile(const SearchScan& p, int64_t first, int64_t column, SearchHit* hits) {
  constexpr int V = Vec::tile_vectors;
  typename Step::Words sum[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) sum[i][j] = Step::start(p, first + i);
  }
  const uint32_t *query = p.queries + first * p.words, *row = p.panel + column;
  for (int64_t w = 0; w < p.words; ++w, row += kSearchPanel) {
    typename Step::Words codes[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) codes[j] = Step::load(row + j * Vec::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const typename Step::Words x = Step::fill(query[i * p.words + w]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) sum[i][j] = Step::multiply_add(x, codes[j], sum[i][j]);
    }
  }
  // Through memory: `choose` has branches, for which the compiler would keep the sums there all along.
  float sums[R * kTileWidth];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) Step::value(sum[i][j]).store(sums + i * kTileWidth + j * Vec::lanes);
  }
  for (int i = 0; i < R; ++i) hits = choose(p, first + i, column, sums + i * kTileWidth, hits);
  return hits;
}

template <class Step>
inline int64_t scan(const SearchScan& p, SearchHit* hits) {
  constexpr int64_t rows = Vec::tile_rows;
  SearchHit* const begin = hits;
  for (int64_t q = 0; q < p.count; q += rows) {
    const int64_t left = p.count - q < rows ? p.count - q : rows;
    for (int64_t column = 0; column < kSearchPanel; column += kTileWidth) {
      gemm::with_rows(left,
                      [&](auto n) SENTFAST_INLINE { hits = scan_tile<Step, decltype(n)::value>(p, q, column, hits); });
    }
  }
  return hits - begin;
}

inline SearchKernels kernels() {
  return {norm,
          norms,
          product,
          {quantize<kSearchInt8>, quantize<kSearchBf16>, quantize<kSearchFp32>},
          panel,
          kPartLanes < 8 ? 2 : 6,
          Int8Step::query_codes,
          {scan<Int8Step>, scan<Bf16Step>, scan<Fp32Step>},
          pairs,
          all};
}

}  // namespace search
