// The kernels of exact search: a first pass over low-precision rows that leaves out what is proven too low, and exact
// scores of the rest. See docs/search-bounds.md.
#pragma once

#include <cstdint>
#include <limits>

namespace sentfast::cpu {

constexpr int64_t kSearchPanel = 64;  // rows of the corpus side by side

// What rows are written as for a pass: a unit row is the center, the same for all rows, plus scale * codes plus a
// residual. The codes are whole numbers to 127 with a scale of their own for each row, or bf16 or fp32 and the scale 1.
enum SearchFormat : int { kSearchInt8, kSearchBf16, kSearchFp32, kSearchFormats };
constexpr int64_t kSearchGroup[kSearchFormats] = {4, 2, 1};              // codes in a word
constexpr uint32_t kSearchFlip[kSearchFormats] = {0x80808080u, 0u, 0u};  // int8 codes of a corpus are stored plus 128

constexpr int kSearchCodes = 127;  // the largest int8 code of a row

// Rows of the factors of a panel, each kSearchPanel long. Packed are the scale, the norms of the residual and of scale
// * codes, the norm of the row, the product of the center and what the unit row is off it, and what the norm is off its
// float32. A pass reads what search_factors makes of them, the last one being for the square of the norm.
enum SearchFactor : int {
  kSearchScale,
  kSearchResidual,
  kSearchHeight,
  kSearchNorm,
  kSearchTilt,
  kSearchNormRest,
  kSearchFactors,
  kSearchSquare = kSearchNormRest
};

// Floats of a matrix, `stride` apart.
struct SearchRows {
  const float* data;
  int64_t stride, dim;
};

// The norms of what scale * codes is off by and of itself, both rounded up, and the sum of int8 codes.
struct SearchCodes {
  double scale, residual, height;
  int32_t sum;
};

// One panel against `count` queries. For each pair the pass has an upper bound of the score, in units of the query:
// the sum and each of the query's numbers times their factors of the row.
struct SearchScan {
  int64_t count, words;                       // queries; words of a row
  const uint32_t* queries;                    // [count, words]
  const int32_t* start;                       // [count] what the sums of codes start from
  const float *norm, *error, *center, *tilt;  // [count], for the factors from kSearchResidual to kSearchTilt
  const float* square;                        // [count] for the last factor, or nullptr
  const float* limit;                         // [count] bounds above it are hits
  const uint32_t* number;                     // [count] what hits call the queries
  const uint32_t* panel;                      // [words, kSearchPanel]
  const float* factors;                       // [kSearchFactors, kSearchPanel]
  int64_t row;                                // the panel's first row
};

struct SearchHit {
  uint32_t query, row;
  float bound;  // of the score, in units of the query; NaN: none
};

struct SearchExact {
  SearchRows queries, corpus;
  int64_t metric;             // of Metric
  const double* query_norms;  // made by search_divisor
};

constexpr double kSearchEps = 1e-12;  // the smallest norm that a cosine divides by
// From here on float32 cannot hold the square of a norm, which then counts as infinite, as in PyTorch's normalize. Of
// one number nothing is squared.
constexpr double kSearchMost = 0x1p64;
// Up to here a cosine has a bound: the norm that the bound is made of is rounded too.
constexpr float kSearchMostBounded = 1.8e19f;

// What a cosine divides by for a norm. NaN stays.
constexpr double search_divisor(double norm, int64_t dim) {
  if (norm < kSearchEps) return kSearchEps;
  return norm >= kSearchMost && dim > 1 ? std::numeric_limits<double>::infinity() : norm;
}

struct SearchKernels {
  // The norm of a row, in double, and those of `count` rows from `first` on.
  double (*norm)(const float* row, int64_t dim);
  void (*norms)(const SearchRows& rows, int64_t first, int64_t count, double* norms);
  double (*product)(const float* a, const float* b, int64_t dim);
  // row / divisor - center as codes of a format, filled up to whole words with 0; nullptr: no center. The scale of int8
  // is at least `least`, its codes are from -most to most.
  SearchCodes (*quantize[kSearchFormats])(const float* row, int64_t dim, double divisor, const float* center,
                                          double least, double most, uint32_t* codes);
  // `rows` rows of words, `stride` apart, become a panel; every word is changed by exclusive or with `flip`.
  void (*panel)(const uint32_t* from, int64_t stride, int64_t rows, int64_t words, uint32_t flip, uint32_t* panel);
  int64_t few;      // queries, for fewer of which a panel of floats is not worth making
  int query_codes;  // the largest int8 code of a query, for which no sum of the pass overflows
  // Writes pairs whose bound is above their query's limit, or NaN: at most count * kSearchPanel; returns how many.
  int64_t (*scan[kSearchFormats])(const SearchScan&, SearchHit* hits);
  // Exact scores of pairs.
  void (*pairs)(const SearchExact&, const SearchHit* hits, int64_t count, float* scores);
  // Exact scores of `count` queries with `rows` rows from `row` on: [count, kSearchPanel].
  void (*all)(const SearchExact&, const uint32_t* queries, int64_t count, int64_t row, int64_t rows, float* scores);
};

}  // namespace sentfast::cpu
