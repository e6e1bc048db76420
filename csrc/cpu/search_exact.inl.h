// Search: exact scores.
//
// Eight sums in double, of every eighth dimension each, added in one order: each instruction set gives the same bits,
// pair by pair as well as by tiles.

namespace search {

constexpr int64_t kLanes = 8;
#if defined(__AVX512F__)
constexpr int kPartLanes = 8;
#elif defined(__AVX2__)
constexpr int kPartLanes = 4;
#else
constexpr int kPartLanes = 2;
#endif
typedef double Part __attribute__((vector_size(8 * kPartLanes)));
typedef float NarrowPart __attribute__((vector_size(4 * kPartLanes)));
typedef float UnalignedPart __attribute__((vector_size(4 * kPartLanes), aligned(4), may_alias));

// Eight doubles in as many vectors as the instruction set needs for them: GCC moves a vector that is wider than the
// registers through memory.
struct Wide {
  static constexpr int parts = kLanes / kPartLanes;
  Part part[parts];

  // f(i) for each part.
  template <class F>
  static SENTFAST_INLINE Wide of(F f) {
    Wide x;
#pragma GCC unroll 4
    for (int i = 0; i < parts; ++i) x.part[i] = f(i);
    return x;
  }
  static SENTFAST_INLINE Wide fill(double x) {
    return of([=](int) SENTFAST_INLINE { return Part{} + x; });
  }
  SENTFAST_INLINE double operator[](int64_t i) const { return part[i / kPartLanes][i % kPartLanes]; }
  friend SENTFAST_INLINE Wide operator+(const Wide& a, const Wide& b) {
    return of([&](int i) SENTFAST_INLINE { return a.part[i] + b.part[i]; });
  }
  friend SENTFAST_INLINE Wide operator-(const Wide& a, const Wide& b) {
    return of([&](int i) SENTFAST_INLINE { return a.part[i] - b.part[i]; });
  }
  friend SENTFAST_INLINE Wide operator*(const Wide& a, const Wide& b) {
    return of([&](int i) SENTFAST_INLINE { return a.part[i] * b.part[i]; });
  }
  // The larger and the smaller; b where either is NaN.
  static SENTFAST_INLINE Wide max(const Wide& a, const Wide& b) {
    return of([&](int i) SENTFAST_INLINE { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
  }
  static SENTFAST_INLINE Wide min(const Wide& a, const Wide& b) {
    return of([&](int i) SENTFAST_INLINE { return a.part[i] < b.part[i] ? a.part[i] : b.part[i]; });
  }
};

SENTFAST_INLINE inline Wide widen(const float* p) {
#if defined(__AVX512F__)
  return {{reinterpret_cast<Part>(_mm512_cvtps_pd(_mm256_loadu_ps(p)))}};  // GCC 12 would convert halves
#else
  return Wide::of([=](int i) SENTFAST_INLINE {
    return __builtin_convertvector(*reinterpret_cast<const UnalignedPart*>(p + i * kPartLanes), Part);
  });
#endif
}
// The first n, from 1 to 7; zero in the other lanes.
SENTFAST_INLINE inline Wide widen(const float* p, int64_t n) {
#if defined(__AVX512F__)
  const __m256 lanes = _mm256_maskz_loadu_ps(static_cast<__mmask8>((1 << n) - 1), p);
  return {{reinterpret_cast<Part>(_mm512_cvtps_pd(lanes))}};
#elif defined(__AVX2__)
  const __m128i count = _mm_set1_epi32(static_cast<int>(n)), first = _mm_setr_epi32(0, 1, 2, 3);
  const __m128 low = _mm_maskload_ps(p, _mm_cmpgt_epi32(count, first));
  const __m128 high = _mm_maskload_ps(p + 4, _mm_cmpgt_epi32(count, _mm_add_epi32(first, _mm_set1_epi32(4))));
  return {{reinterpret_cast<Part>(_mm256_cvtps_pd(low)), reinterpret_cast<Part>(_mm256_cvtps_pd(high))}};
#else
  float lane[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lane[i] = p[i];
  return widen(lane);
#endif
}
// ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7)), halves on halves.
SENTFAST_INLINE inline double total(const Wide& s) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m512d all = reinterpret_cast<__m512d>(s.part[0]);
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(all), _mm512_extractf64x4_pd(all, 1));
#else
  const __m256d four = _mm256_add_pd(reinterpret_cast<__m256d>(s.part[0]), reinterpret_cast<__m256d>(s.part[1]));
#endif
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
#else
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
#endif
}

// Products of two floats are exact in double, so that rounding the product or not is the same.
struct Product {
  static SENTFAST_INLINE Wide add(Wide a, Wide b, Wide sum) { return sum + a * b; }
};
struct SquaredDifference {
  static SENTFAST_INLINE Wide add(Wide a, Wide b, Wide sum) {
    const Wide difference = a - b;
#if defined(__FMA__) || defined(__aarch64__)
    return sum + difference * difference;  // one rounding: the compiler contracts it
#else
    return Wide::of([&](int i) SENTFAST_INLINE {
      Part part;
      for (int n = 0; n < kPartLanes; ++n) {
        part[n] = __builtin_fma(difference.part[i][n], difference.part[i][n], sum.part[i][n]);
      }
      return part;
    });
#endif
  }
};

// Calls step(d, load) for every eight dimensions, the last ones with a load that knows how many there are.
template <class F>
SENTFAST_INLINE inline void each_lanes(int64_t dim, const F& step) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) step(d, [](const float* p) SENTFAST_INLINE { return widen(p); });
  if (d < dim) step(d, [n = dim - d](const float* p) SENTFAST_INLINE { return widen(p, n); });
}

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
  each_lanes(dim, step);
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

// The score of a pair from its sum.
inline float score(int64_t metric, double sum, double query_norm, double row_norm) {
  if (metric == kCosine) return static_cast<float>(sum / (query_norm * row_norm));
  return static_cast<float>(metric == kDot ? sum : -__builtin_sqrt(sum));
}

// Several rows at a time, so that their sums do not wait for each other.
constexpr int kTogether = Vec::tile_vectors >= 4 ? 4 : 2;

// The sums of the rows k with one query, or each with its own, and the norms that go with them, in one pass.
template <class Term, bool Norms, int Q>
SENTFAST_INLINE inline void together(const float* const (&q)[Q], const float* const (&k)[kTogether], int64_t dim,
                                     double (&sums)[kTogether], double (&norms)[kTogether]) {
  Wide sum[kTogether] = {}, square[kTogether] = {};
  const auto step = [&](int64_t d, auto load) SENTFAST_INLINE {
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) {
      const Wide x = load(k[i] + d);
      sum[i] = Term::add(load(q[Q == 1 ? 0 : i] + d), x, sum[i]);
      if (Norms) square[i] = Product::add(x, x, square[i]);
    }
  };
  each_lanes(dim, step);
#pragma GCC unroll 4
  for (int i = 0; i < kTogether; ++i) {
    sums[i] = total(sum[i]);
    norms[i] = Norms ? search_divisor(__builtin_sqrt(total(square[i])), dim) : 1.0;
  }
}

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
    double sums[kTogether], norms[kTogether];
    together<Term, Norms>(q, k, p.corpus.dim, sums, norms);
    for (int i = 0; i < kTogether && h + i < count; ++i) {
      scores[h + i] = score(p.metric, sums[i], p.query_norms[hits[h + i].query], norms[i]);
    }
  }
}

inline void pairs(const SearchExact& p, const SearchHit* hits, int64_t count, float* scores) {
  if (p.metric == kCosine) return pairs_of<Product, true>(p, hits, count, scores);
  if (p.metric == kDot) return pairs_of<Product, false>(p, hits, count, scores);
  pairs_of<SquaredDifference, false>(p, hits, count, scores);
}

// Norms of `count` rows, some side by side so that their sums do not wait for each other.
inline void norms(const SearchRows& rows, int64_t first, int64_t count, double* norms) {
  constexpr int C = 4;
  for (int64_t n = 0; n < count; n += C) {
    const float* row[C];
    for (int j = 0; j < C; ++j) row[j] = rows.data + (first + (n + j < count ? n + j : count - 1)) * rows.stride;
    Wide sum[C] = {};
    const auto step = [&](int64_t d, auto load) SENTFAST_INLINE {
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) {
        const Wide x = load(row[j] + d);
        sum[j] = Product::add(x, x, sum[j]);
      }
    };
    each_lanes(rows.dim, step);
    for (int j = 0; j < C && n + j < count; ++j) norms[n + j] = __builtin_sqrt(total(sum[j]));
  }
}

// One query with all rows of a panel.
template <class Term, bool Norms>
SENTFAST_INLINE inline void one_with_all(const SearchExact& p, uint32_t query, const float* first, int64_t rows,
                                         float* scores) {
  const float* const q[1] = {p.queries.data + static_cast<int64_t>(query) * p.queries.stride};
  for (int64_t m = 0; m < rows; m += kTogether) {
    const float* k[kTogether];
    for (int i = 0; i < kTogether; ++i) k[i] = first + (m + i < rows ? m + i : rows - 1) * p.corpus.stride;
    double sums[kTogether], norms[kTogether];
    together<Term, Norms>(q, k, p.corpus.dim, sums, norms);
    for (int i = 0; i < kTogether && m + i < rows; ++i) {
      scores[m + i] = score(p.metric, sums[i], p.query_norms[query], norms[i]);
    }
  }
}

// R queries, of which `some` are wanted, with all rows of a panel.
template <class Term, int R, int C>
SENTFAST_INLINE inline void all_tile(const SearchExact& p, const uint32_t* queries, int64_t some, const float* first,
                                     int64_t rows, const double* norms, float* scores) {
  const float* q[R];
  for (int i = 0; i < R; ++i) {
    q[i] = p.queries.data + static_cast<int64_t>(queries[i < some ? i : some - 1]) * p.queries.stride;
  }
  for (int64_t m = 0; m < rows; m += C) {
    const float* k[C];
    for (int j = 0; j < C; ++j) k[j] = first + (m + j < rows ? m + j : rows - 1) * p.corpus.stride;
    double sums[R][C];
    exact_tile<Term>(q, k, p.corpus.dim, sums);
    for (int i = 0; i < R && i < some; ++i) {
      for (int j = 0; j < C && m + j < rows; ++j) {
        scores[i * kSearchPanel + m + j] = score(p.metric, sums[i][j], p.query_norms[queries[i]], norms[m + j]);
      }
    }
  }
}

template <class Term>
SENTFAST_INLINE inline void all_of(const SearchExact& p, const uint32_t* queries, int64_t count, int64_t row,
                                   int64_t rows, float* scores) {
  constexpr int R = Vec::tile_vectors >= 4 ? 4 : 2;
  const float* first = p.corpus.data + row * p.corpus.stride;
  if (count == 1) {
    if (p.metric == kCosine) return one_with_all<Term, true>(p, queries[0], first, rows, scores);
    return one_with_all<Term, false>(p, queries[0], first, rows, scores);
  }
  double divisors[kSearchPanel];
  if (p.metric == kCosine) {
    norms(p.corpus, row, rows, divisors);
    for (int64_t j = 0; j < rows; ++j) divisors[j] = search_divisor(divisors[j], p.corpus.dim);
  } else {
    fill(divisors, kSearchPanel, 1.0);
  }
  int64_t n = 0;
  for (; count - n > 1; n += R) {
    all_tile<Term, R, R>(p, queries + n, count - n, first, rows, divisors, scores + n * kSearchPanel);
  }
  if (n < count) all_tile<Term, 1, 4>(p, queries + n, 1, first, rows, divisors, scores + n * kSearchPanel);
}

inline void all(const SearchExact& p, const uint32_t* queries, int64_t count, int64_t row, int64_t rows,
                float* scores) {
  if (p.metric == kEuclidean) return all_of<SquaredDifference>(p, queries, count, row, rows, scores);
  all_of<Product>(p, queries, count, row, rows, scores);
}

}  // namespace search
