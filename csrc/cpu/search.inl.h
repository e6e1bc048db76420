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
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Wide);
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

inline double norm(const float* row, int64_t dim) {
  const float* const rows[1] = {row};
  double sums[1][1];
  exact_tile<Product>(rows, rows, dim, sums);
  return __builtin_sqrt(sums[0][0]);
}

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

inline void unit(const float* row, int64_t dim, double divisor, float* out) {
  const double factor = 1 / divisor;
  for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<float>(row[d] * factor);
}

inline SearchCodes quantize(const float* row, int64_t dim, double divisor, double least, uint32_t* codes) {
  auto* out = reinterpret_cast<int8_t*>(codes);
  float largest[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const float x = __builtin_fabsf(row[d + i]);
      largest[i] = x > largest[i] ? x : largest[i];
    }
  }
  float most = 0;
  for (; d < dim; ++d) most = __builtin_fabsf(row[d]) > most ? __builtin_fabsf(row[d]) : most;
  for (int i = 0; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
  // The scale is kept as a float, so the codes are those of the float.
  float scale = static_cast<float>(most / divisor / 127);
  if (scale < least) scale = static_cast<float>(least);
  const double unit = 1 / divisor, inverse = scale > 0 ? 1 / (divisor * scale) : 0;
  double residuals[kLanes] = {};
  int32_t sums[kLanes] = {}, squares[kLanes] = {};
  const auto put = [&](int64_t at, int i) SENTFAST_INLINE {
    double x = __builtin_rint(row[at] * inverse);
    x = x > 127 ? 127 : x;
    x = x < -127 ? -127 : x;
    const auto code = static_cast<int32_t>(x);
    out[at] = static_cast<int8_t>(code);
    const double off = row[at] * unit - x * scale;
    residuals[i] += off * off;
    sums[i] += code;
    squares[i] += code * code;
  };
  for (d = 0; d + kLanes <= dim; d += kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; ++i) put(d + i, i);
  }
  for (; d < dim; ++d) put(d, 0);
  for (; d % kSearchGroup != 0; ++d) out[d] = 0;
  double residual = 0, square = 0;
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) {
    residual += residuals[i];
    square += squares[i];
    sum += sums[i];
  }
  // Rounded up, so that what is computed with them stays a bound.
  constexpr double up = 1 + 0x1p-20;
  return {scale, up * __builtin_sqrt(residual), up * scale * __builtin_sqrt(square), sum};
}

inline void panel(const uint32_t* from, int64_t rows, int64_t words, uint32_t flip, uint32_t* panel) {
  gemm::turn(from, words, rows, words, kSearchPanel, panel, kSearchPanel);
  if (flip == 0) return;
  for (int64_t i = 0; i < words * kSearchPanel; ++i) panel[i] ^= flip;
}

// Four products of a query's signed codes and a row's codes plus 128, added to an int32.
struct CodeStep {
#if defined(__AVX512VNNI__)
  static SENTFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    return {_mm512_castsi512_ps(
        _mm512_dpbusd_epi32(_mm512_castps_si512(c.v), _mm512_castps_si512(b.v), _mm512_castps_si512(a.v)))};
  }
#elif defined(__AVX512BW__)
  static SENTFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    const __m512i x = _mm512_castps_si512(a.v), y = _mm512_castps_si512(b.v);
    const __m512i even =
        _mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_and_si512(y, _mm512_set1_epi16(255)));
    const __m512i odd = _mm512_madd_epi16(_mm512_srai_epi16(x, 8), _mm512_srli_epi16(y, 8));
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(c.v), _mm512_add_epi32(even, odd)))};
  }
#elif defined(__AVX2__)
  static SENTFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    const __m256i x = _mm256_castps_si256(a.v), y = _mm256_castps_si256(b.v);
    const __m256i even =
        _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_and_si256(y, _mm256_set1_epi16(255)));
    const __m256i odd = _mm256_madd_epi16(_mm256_srai_epi16(x, 8), _mm256_srli_epi16(y, 8));
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(c.v), _mm256_add_epi32(even, odd)))};
  }
#else
  static Vec multiply_add(Vec a, Vec b, Vec c) {
    for (int lane = 0; lane < Vec::lanes; ++lane) {
      int8_t x[kSearchGroup];
      uint8_t y[kSearchGroup];
      int32_t sum;
      __builtin_memcpy(x, &a.v[lane], 4);
      __builtin_memcpy(y, &b.v[lane], 4);
      __builtin_memcpy(&sum, &c.v[lane], 4);
      for (int i = 0; i < kSearchGroup; ++i) sum += x[i] * y[i];
      __builtin_memcpy(&c.v[lane], &sum, 4);
    }
    return c;
  }
#endif
  // The sums as floats.
#if defined(__AVX512F__)
  static SENTFAST_INLINE Vec value(Vec sum) { return {_mm512_cvtepi32_ps(_mm512_castps_si512(sum.v))}; }
#elif defined(__AVX2__)
  static SENTFAST_INLINE Vec value(Vec sum) { return {_mm256_cvtepi32_ps(_mm256_castps_si256(sum.v))}; }
#else
  static Vec value(Vec sum) {
    for (int lane = 0; lane < Vec::lanes; ++lane) {
      int32_t x;
      __builtin_memcpy(&x, &sum.v[lane], 4);
      sum.v[lane] = static_cast<float>(x);
    }
    return sum;
  }
#endif
  static SENTFAST_INLINE Vec start(const SearchScan& p, int64_t query) {
    return Vec::broadcast(reinterpret_cast<const Word*>(p.start + query));
  }
};

struct FloatStep : gemm::Float32Step {
  static SENTFAST_INLINE Vec value(Vec sum) { return sum; }
  static SENTFAST_INLINE Vec start(const SearchScan&, int64_t) { return Vec::zero(); }
};

// R queries from `first` on against the columns of a tile from `column` on.
template <class Step, int R>
SENTFAST_INLINE inline SearchHit* scan_tile(const SearchScan& p, int64_t first, int64_t column, SearchHit* hits) {
  constexpr int V = Vec::tile_vectors;
  Vec sum[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    const Vec start = Step::start(p, first + i);
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) sum[i][j] = start;
  }
  gemm::accumulate<Step>(sum, reinterpret_cast<const Word*>(p.queries + first * p.words), p.words,
                         reinterpret_cast<const Word*>(p.panel + column), kSearchPanel, p.words);
  const float* factors = p.factors + column;
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    const int64_t q = first + i;
    const Vec norm = Vec::fill(p.norm[q]), error = Vec::fill(p.error[q]), limit = Vec::fill(p.limit[q]);
    uint64_t found = 0;
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      const auto factor = [&](int n) SENTFAST_INLINE { return Vec::load(factors + n * kSearchPanel + j * Vec::lanes); };
      Vec bound = Vec::fma(norm, factor(kSearchResidual), error * factor(kSearchHeight));
      bound = Vec::fma(Step::value(sum[i][j]), factor(kSearchScale), bound);
      if (p.shift != nullptr) bound = Vec::fma(Vec::fill(p.shift[q]), factor(kSearchNorm), bound);
      found |= static_cast<uint64_t>(Vec::bits(Vec::above(bound, limit))) << (j * Vec::lanes);
    }
    for (; found != 0; found &= found - 1) {
      *hits++ = {p.number[q], static_cast<uint32_t>(p.row + column + __builtin_ctzll(found))};
    }
  }
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

inline SearchKernels kernels() { return {norm, quantize, unit, panel, scan<CodeStep>, scan<FloatStep>, pairs, all}; }

}  // namespace search
