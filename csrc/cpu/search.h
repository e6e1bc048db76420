// The kernels of exact search: a first pass over low-precision rows that leaves out what is proven too low, and exact
// scores of the rest. See docs/search.md for the bounds.
#pragma once

#include <cstdint>

namespace sentfast::cpu {

constexpr int64_t kSearchPanel = 64;           // rows of the corpus side by side
constexpr int64_t kSearchGroup = 4;            // codes in a word
constexpr uint32_t kSearchZero = 0x80808080u;  // four codes of 0: codes of the corpus are stored plus 128

// Rows of the factors of a panel, each kSearchPanel long. As packed: scale of the codes, norm of the residual, norm of
// the quantised unit row, norm of the row. As a pass reads them: what they become in search_factors.
enum SearchFactor : int { kSearchScale, kSearchResidual, kSearchHeight, kSearchNorm, kSearchFactors };

// Floats of a matrix, `stride` apart.
struct SearchRows {
  const float* data;
  int64_t stride, dim;
};

// A row divided by `divisor`, as codes times a scale: codes -127 to 127 in `groups` words, and how far they are off.
struct SearchCodes {
  double scale, residual, height;
  int32_t sum;  // of the codes
};

// One panel against `count` queries. For each pair the pass has an upper bound of the score in units of the query:
// scale * sum + norm * residual + error * height + shift * (norm of the panel's factors).
struct SearchScan {
  int64_t count, words;                       // queries; words of a row
  const uint32_t* queries;                    // [count, words]
  const int32_t* start;                       // [count] what the sums of codes start from
  const float *norm, *error, *shift, *limit;  // [count]; shift: nullptr without one
  const uint32_t* number;                     // [count] what hits call the queries
  const uint32_t* panel;                      // [words, kSearchPanel]
  const float* factors;                       // [kSearchFactors, kSearchPanel]
  int64_t row;                                // the panel's first row
};

struct SearchHit {
  uint32_t query, row;
};

struct SearchExact {
  SearchRows queries, corpus;
  int64_t metric;             // of Metric
  const double* query_norms;  // at least kSearchEps
};

constexpr double kSearchEps = 1e-12;  // the smallest norm that a cosine divides by

struct SearchKernels {
  // The norm of a row, in double.
  double (*norm)(const float* row, int64_t dim);
  // Codes of a row into [words], the words beyond the row's end 0; scale is at least `least`.
  SearchCodes (*quantize)(const float* row, int64_t dim, double divisor, double least, uint32_t* codes);
  // A row divided by a number.
  void (*unit)(const float* row, int64_t dim, double divisor, float* out);
  // `rows` rows of words, `words` apart, become a panel; every word is changed by exclusive or with `flip`.
  void (*panel)(const uint32_t* from, int64_t rows, int64_t words, uint32_t flip, uint32_t* panel);
  // Writes pairs whose bound is above their query's limit, or NaN: at most count * kSearchPanel; returns how many.
  int64_t (*scan_codes)(const SearchScan&, SearchHit* hits);
  int64_t (*scan_floats)(const SearchScan&, SearchHit* hits);
  // Exact scores of pairs.
  void (*pairs)(const SearchExact&, const SearchHit* hits, int64_t count, float* scores);
  // Exact scores of `count` queries with `rows` rows from `row` on: [count, kSearchPanel].
  void (*all)(const SearchExact&, const uint32_t* queries, int64_t count, int64_t row, int64_t rows, float* scores);
};

}  // namespace sentfast::cpu
