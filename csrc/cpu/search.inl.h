// Search: quantised rows, the first pass over a panel, and exact scores.

namespace search {

// ---- exact scores ----
//
// Eight sums in double, of every eighth dimension each, added in one order: each instruction set gives the same bits,
// pair by pair as well as by tiles.

constexpr int64_t kLanes = 8;
typedef double Wide __attribute__((vector_size(64)));
typedef float Narrow __attribute__((vector_size(32), aligned(4), may_alias));

SENTFAST_INLINE inline Wide widen(const float* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Wide>(_mm512_cvtps_pd(_mm256_loadu_ps(p)));  // GCC 12 would convert halves
#else
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Wide);
#endif
}
SENTFAST_INLINE inline Wide widen(const float* p, int64_t n) {
  float lane[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lane[i] = p[i];
  return widen(lane);
}
SENTFAST_INLINE inline double total(Wide s) {
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// Products of two floats are exact in double, so that rounding the product or not is the same.
struct Product {
  static SENTFAST_INLINE Wide add(Wide a, Wide b, Wide sum) { return sum + a * b; }
};
struct SquaredDifference {
  static SENTFAST_INLINE Wide add(Wide a, Wide b, Wide sum) {
    const Wide difference = a - b;
#if defined(__FMA__)
    return sum + difference * difference;  // one rounding: the compiler contracts it
#else
    for (int i = 0; i < kLanes; ++i) sum[i] = __builtin_fma(difference[i], difference[i], sum[i]);
    return sum;
#endif
  }
};

// sums[i][j] of R rows by C rows.
template <class Term, int R, int C>
SENTFAST_INLINE inline void exact_tile(const float* const (&a)[R], const float* const (&b)[C], int64_t dim,
                                       double (&sums)[R][C]) {
  Wide sum[R][C] = {};
  const auto step = [&](int64_t d, auto load) SENTFAST_INLINE {
    Wide column[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) column[j] = load(b[j] + d);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Wide x = load(a[i] + d);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sum[i][j] = Term::add(x, column[j], sum[i][j]);
    }
  };
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) step(d, [](const float* p) SENTFAST_INLINE { return widen(p); });
  if (d < dim) step(d, [n = dim - d](const float* p) SENTFAST_INLINE { return widen(p, n); });
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) sums[i][j] = total(sum[i][j]);
  }
}

inline double product(const float* a, const float* b, int64_t dim) {
  const float *const left[1] = {a}, *const right[1] = {b};
  double sums[1][1];
  exact_tile<Product>(left, right, dim, sums);
  return sums[0][0];
}

inline double norm(const float* row, int64_t dim) { return __builtin_sqrt(product(row, row, dim)); }

inline double cosine_norm(const float* row, int64_t dim) {
  const double n = norm(row, dim);
  return n < kSearchEps ? kSearchEps : n;
}

// The score of a pair from its sum.
inline float score(int64_t metric, double sum, double query_norm, double row_norm) {
  if (metric == kCosine) return static_cast<float>(sum / (query_norm * row_norm));
  return static_cast<float>(metric == kDot ? sum : -__builtin_sqrt(sum));
}

// Several rows at a time, each the partner of its own query: their sums do not wait for each other.
constexpr int kTogether = 4;

template <class Term, bool Norms>
SENTFAST_INLINE inline void pairs_of(const SearchExact& p, const SearchHit* hits, int64_t count, float* scores) {
  for (int64_t h = 0; h < count; h += kTogether) {
    const float *q[kTogether], *k[kTogether];
    for (int i = 0; i < kTogether; ++i) {
      const SearchHit hit = hits[h + i < count ? h + i : count - 1];
      q[i] = p.queries.data + static_cast<int64_t>(hit.query) * p.queries.stride;
      k[i] = p.corpus.data + static_cast<int64_t>(hit.row) * p.corpus.stride;
      if (h + kTogether + i < count) {
        const float* next = p.corpus.data + static_cast<int64_t>(hits[h + kTogether + i].row) * p.corpus.stride;
        for (int64_t d = 0; d < p.corpus.dim; d += 16) prefetch(next + d);
      }
    }
    Wide sum[kTogether] = {}, square[kTogether] = {};
    const auto step = [&](int64_t d, auto load) SENTFAST_INLINE {
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) {
        const Wide x = load(k[i] + d);
        sum[i] = Term::add(load(q[i] + d), x, sum[i]);
        if (Norms) square[i] = Product::add(x, x, square[i]);
      }
    };
    int64_t d = 0;
    for (; d + kLanes <= p.corpus.dim; d += kLanes) step(d, [](const float* x) SENTFAST_INLINE { return widen(x); });
    const int64_t rest = p.corpus.dim - d;
    if (rest > 0) step(d, [rest](const float* x) SENTFAST_INLINE { return widen(x, rest); });
    for (int i = 0; i < kTogether && h + i < count; ++i) {
      double row_norm = 1;
      if (Norms) {
        row_norm = __builtin_sqrt(total(square[i]));
        if (row_norm < kSearchEps) row_norm = kSearchEps;
      }
      scores[h + i] = score(p.metric, total(sum[i]), p.query_norms[hits[h + i].query], row_norm);
    }
  }
}

inline void pairs(const SearchExact& p, const SearchHit* hits, int64_t count, float* scores) {
  if (p.metric == kCosine) return pairs_of<Product, true>(p, hits, count, scores);
  if (p.metric == kDot) return pairs_of<Product, false>(p, hits, count, scores);
  pairs_of<SquaredDifference, false>(p, hits, count, scores);
}

template <class Term>
SENTFAST_INLINE inline void all_of(const SearchExact& p, const uint32_t* queries, int64_t count, int64_t row,
                                   int64_t rows, float* scores) {
  constexpr int R = Vec::tile_vectors >= 4 ? 4 : 2, C = R;
  const float* first = p.corpus.data + row * p.corpus.stride;
  double norms[kSearchPanel];
  for (int64_t j = 0; j < rows; ++j) {
    norms[j] = p.metric == kCosine ? cosine_norm(first + j * p.corpus.stride, p.corpus.dim) : 1;
  }
  for (int64_t n = 0; n < count; n += R) {
    const float* q[R];
    for (int i = 0; i < R; ++i) {
      const int64_t number = queries[n + i < count ? n + i : count - 1];
      q[i] = p.queries.data + number * p.queries.stride;
    }
    for (int64_t m = 0; m < rows; m += C) {
      const float* k[C];
      for (int j = 0; j < C; ++j) k[j] = first + (m + j < rows ? m + j : rows - 1) * p.corpus.stride;
      double sums[R][C];
      exact_tile<Term>(q, k, p.corpus.dim, sums);
      for (int i = 0; i < R && n + i < count; ++i) {
        for (int j = 0; j < C && m + j < rows; ++j) {
          scores[(n + i) * kSearchPanel + m + j] =
              score(p.metric, sums[i][j], p.query_norms[queries[n + i]], norms[m + j]);
        }
      }
    }
  }
}

inline void all(const SearchExact& p, const uint32_t* queries, int64_t count, int64_t row, int64_t rows,
                float* scores) {
  if (p.metric == kEuclidean) return all_of<SquaredDifference>(p, queries, count, row, rows, scores);
  all_of<Product>(p, queries, count, row, rows, scores);
}

// ---- low precision ----

// The nearest whole numbers of what is below 2^51.
SENTFAST_INLINE inline Wide nearest(Wide x) {
  constexpr double whole = 0x1.8p52;
  return (x + whole) - whole;
}

// Each writes up to eight codes of numbers to place d, and returns their values.
struct Int8Codes {
  int8_t* out;
  double inverse;
  SENTFAST_INLINE Wide put(Wide x, int64_t d, int64_t count) const {
    typedef int32_t Whole __attribute__((vector_size(32)));
    typedef int8_t Codes __attribute__((vector_size(8)));
    Wide code = nearest(x * inverse);
    code = code > 127 ? Wide{} + 127 : code;
    code = code < -127 ? Wide{} - 127 : code;
    const Codes bytes = __builtin_convertvector(__builtin_convertvector(code, Whole), Codes);
    __builtin_memcpy(out + d, &bytes, static_cast<size_t>(count));
    return code;
  }
};
struct Bf16Codes {
  uint16_t* out;
  SENTFAST_INLINE Wide put(Wide x, int64_t d, int64_t count) const {
    typedef uint32_t Bits __attribute__((vector_size(32)));
    typedef uint16_t Halves __attribute__((vector_size(16)));
    const Narrow near = __builtin_convertvector(x, Narrow);
    Bits bits;
    __builtin_memcpy(&bits, &near, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Halves halves = __builtin_convertvector(bits, Halves);
    __builtin_memcpy(out + d, &halves, static_cast<size_t>(2 * count));
    bits <<= 16;
    Narrow value;
    __builtin_memcpy(&value, &bits, sizeof bits);
    return __builtin_convertvector(value, Wide);
  }
};
struct Fp32Codes {
  float* out;
  SENTFAST_INLINE Wide put(Wide x, int64_t d, int64_t count) const {
    const Narrow near = __builtin_convertvector(x, Narrow);
    __builtin_memcpy(out + d, &near, static_cast<size_t>(4 * count));
    return __builtin_convertvector(near, Wide);
  }
};

template <SearchFormat Format>
inline SearchCodes quantize(const float* row, int64_t dim, double divisor, const float* center, double least,
                            uint32_t* codes) {
  constexpr int64_t group = kSearchGroup[Format];
  const int64_t places = (dim + group - 1) / group * group;
  const double unit = 1 / divisor;
  const auto each = [&](auto f) SENTFAST_INLINE {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t n = dim - d;
      Wide x = (n < kLanes ? widen(row + d, n) : widen(row + d)) * unit;
      if (center != nullptr) x -= n < kLanes ? widen(center + d, n) : widen(center + d);
      f(d, x);
    }
  };
  double scale = 1;
  Wide residual = {}, square = {}, sum = {};
  const auto write = [&](auto format) SENTFAST_INLINE {
    each([&](int64_t d, Wide x) SENTFAST_INLINE {
      const Wide code = format.put(x, d, places - d < kLanes ? places - d : kLanes);
      const Wide off = x - code * scale;
      residual += off * off;
      square += code * code;
      sum += code;
    });
  };
  if constexpr (Format == kSearchInt8) {
    Wide largest = {};
    each([&](int64_t, Wide x) SENTFAST_INLINE {
      const Wide size = x < 0 ? -x : x;
      largest = size > largest ? size : largest;
    });
    double most = 0;
    for (int i = 0; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
    // The scale is kept as a float, so the codes are those of the float.
    scale = static_cast<float>(most / 127);
    if (scale < least) scale = static_cast<float>(least);
    write(Int8Codes{reinterpret_cast<int8_t*>(codes), scale > 0 ? 1 / scale : 0});
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

inline void panel(const uint32_t* from, int64_t rows, int64_t words, uint32_t flip, uint32_t* panel) {
  gemm::turn(from, words, rows, words, kSearchPanel, panel, kSearchPanel);
  if (flip == 0) return;
  for (int64_t i = 0; i < words * kSearchPanel; ++i) panel[i] ^= flip;
}

// Four products of a query's signed codes and a row's codes plus 128, added to an int32.
struct Int8Step {
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
#elif defined(__AVX512BW__)
  static SENTFAST_INLINE Words multiply_add(Words query, Words row, Words sum) {
    const Words even = _mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16(query, 8), 8),
                                         _mm512_and_si512(row, _mm512_set1_epi16(255)));
    const Words odd = _mm512_madd_epi16(_mm512_srai_epi16(query, 8), _mm512_srli_epi16(row, 8));
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
  }
#elif defined(__AVX2__)
  static SENTFAST_INLINE Words multiply_add(Words query, Words row, Words sum) {
    const Words even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(query, 8), 8),
                                         _mm256_and_si256(row, _mm256_set1_epi16(255)));
    const Words odd = _mm256_madd_epi16(_mm256_srai_epi16(query, 8), _mm256_srli_epi16(row, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
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
#else
    return gemm::WideBFloat16Step::multiply_add(query, row, sum);
#endif
  }
};

// The pairs of query q whose bounds exceed its limit, from their sums with the columns of a tile.
SENTFAST_INLINE inline SearchHit* choose(const SearchScan& p, int64_t q, int64_t column, const float* sums,
                                         SearchHit* hits) {
  const Vec norm = Vec::fill(p.norm[q]), error = Vec::fill(p.error[q]), center = Vec::fill(p.center[q]);
  const Vec tilt = Vec::fill(p.tilt[q]), limit = Vec::fill(p.limit[q]);
  uint64_t found = 0;
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
  }
  for (; found != 0; found &= found - 1) {
    *hits++ = {p.number[q], static_cast<uint32_t>(p.row + column + __builtin_ctzll(found))};
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
  // Through memory: what follows has branches, for which the compiler would keep the sums there all along.
  constexpr int width = V * Vec::lanes;
  float sums[R * width];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) Step::value(sum[i][j]).store(sums + i * width + j * Vec::lanes);
  }
  for (int i = 0; i < R; ++i) hits = choose(p, first + i, column, sums + i * width, hits);
  return hits;
}

template <class Step>
inline int64_t scan(const SearchScan& p, SearchHit* hits) {
  constexpr int64_t rows = Vec::tile_rows, columns = Vec::tile_vectors * Vec::lanes;
  SearchHit* const begin = hits;
  for (int64_t q = 0; q < p.count; q += rows) {
    const int64_t left = p.count - q < rows ? p.count - q : rows;
    for (int64_t column = 0; column < kSearchPanel; column += columns) {
      gemm::with_rows(left,
                      [&](auto n) SENTFAST_INLINE { hits = scan_tile<Step, decltype(n)::value>(p, q, column, hits); });
    }
  }
  return hits - begin;
}

inline SearchKernels kernels() {
  return {norm,
          product,
          {quantize<kSearchInt8>, quantize<kSearchBf16>, quantize<kSearchFp32>},
          panel,
          {scan<Int8Step>, scan<Bf16Step>, scan<Fp32Step>},
          pairs,
          all};
}

}  // namespace search
