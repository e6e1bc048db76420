// What exact search knows of a score before it is computed: factors of rows, of queries, and the limits of bounds. The
// proof is in docs/search-bounds.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "isa.h"

namespace sentfast::cpu {

// More than the errors of all that is computed in double for a pair of unit vectors: their sums and norms.
inline double search_error(int64_t dim) { return static_cast<double>(dim + 64) * 0x1p-52; }

inline bool search_unit_exists(double norm) { return norm > 0 && norm <= std::numeric_limits<double>::max(); }

// Writes the factors of a row's norm into its column of a panel's, the others being 0; whether there is a unit row.
inline bool search_pack_norm(double norm, float* factors) {
  for (int n = 0; n < kSearchFactors; ++n) factors[n * kSearchPanel] = 0;
  const auto near = static_cast<float>(norm);
  factors[kSearchNorm * kSearchPanel] = near;
  if (!search_unit_exists(norm)) return false;
  factors[kSearchNormRest * kSearchPanel] = static_cast<float>(norm - static_cast<double>(near));
  return true;
}

// The factors of a row whose codes are its own numbers: its scale is what divides them by the norm.
inline void search_pack_plain(double norm, float* factors) {
  if (!search_pack_norm(norm, factors)) return;
  constexpr double up = 1 + 0x1p-20;
  const auto scale = static_cast<float>(1 / norm);
  const double height = static_cast<double>(scale) * norm;
  factors[kSearchScale * kSearchPanel] = scale;
  factors[kSearchResidual * kSearchPanel] = static_cast<float>((std::fabs(1 - height) + 0x1p-50) * up);
  factors[kSearchHeight * kSearchPanel] = static_cast<float>(height * up);
}

// Writes the codes of a row, and its factors into its column of a panel's. center: nullptr for none; `square` is its
// product with itself.
inline void search_pack_row(SearchFormat format, const float* row, int64_t dim, const float* center, double square,
                            uint32_t* codes, float* factors) {
  const SearchKernels& kernel = kernels().search;
  const double norm = kernel.norm(row, dim);
  const auto factor = [=](int n) -> float& { return factors[n * kSearchPanel]; };
  if (!search_pack_norm(norm, factors)) {
    std::fill_n(codes, (dim + kSearchGroup[format] - 1) / kSearchGroup[format], 0u);
    return;
  }
  const SearchCodes c = kernel.quantize[format](row, dim, norm, center, 0, kSearchCodes, codes);
  factor(kSearchScale) = static_cast<float>(c.scale);
  factor(kSearchResidual) = static_cast<float>(c.residual);
  factor(kSearchHeight) = static_cast<float>(c.height);
  if (center != nullptr) factor(kSearchTilt) = static_cast<float>(kernel.product(row, center, dim) / norm - square);
}

// What the rows of a panel weigh in a pass, from what was packed. Of each weight the base is left out, the smallest of
// the weights, which is returned: what all rows share is taken from the limits, in double. `sums` is the error of the
// pass's sums, in products of the lengths.
inline double search_factors(int64_t metric, const float* packed, int64_t rows, int64_t dim, double sums, float* out) {
  const auto row = [](auto* factors, int n) { return factors + n * kSearchPanel; };
  const float *scale = row(packed, kSearchScale), *residual = row(packed, kSearchResidual);
  const float *height = row(packed, kSearchHeight), *tilt = row(packed, kSearchTilt);
  const float *norm = row(packed, kSearchNorm), *rest = row(packed, kSearchNormRest);
  // Norms for which products or errors leave float32 get no bound: NaN lets every pair through.
  const float largest = metric == kCosine ? kSearchMostBounded : metric == kDot ? 1e30f : 1e10f;
  const float smallest = metric == kCosine ? 1.001e-12f : metric == kDot ? 1e-20f : 1e-15f;
  double weight[kSearchPanel], base = std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < kSearchPanel; ++j) {
    const bool bounded = norm[j] == 0 || (norm[j] >= smallest && norm[j] <= largest);
    const double exact = metric == kCosine ? (norm[j] > 0 ? 1.0 : 0.0) : static_cast<double>(norm[j]) + rest[j];
    weight[j] = bounded ? exact : std::numeric_limits<double>::quiet_NaN();
  }
  for (int64_t j = 0; j < rows; ++j) base = weight[j] < base ? weight[j] : base;
  if (!(base < std::numeric_limits<double>::infinity())) base = 0;
  // `up` is more than a dozen roundings of a factor, of the query's and of the sums with them.
  constexpr float up = 1 + 0x1p-19f, rounding = 0x1p-19f;
  const auto error = static_cast<float>(search_error(dim)), spread = static_cast<float>(sums) + rounding;
  for (int64_t j = 0; j < kSearchPanel; ++j) {
    const auto w = static_cast<float>(weight[j]);
    row(out, kSearchScale)[j] = scale[j] * w;
    row(out, kSearchResidual)[j] = w * (residual[j] + spread * height[j]) * up;
    row(out, kSearchHeight)[j] = w * height[j] * up;
    row(out, kSearchNorm)[j] = static_cast<float>(weight[j] - base);
    row(out, kSearchTilt)[j] = w * (tilt[j] + rounding * std::fabs(tilt[j]) + error);
  }
  for (int64_t j = 0; j < kSearchPanel; ++j) {
    row(out, kSearchSquare)[j] =
        metric == kEuclidean ? static_cast<float>((base - weight[j]) * (base + weight[j]) * (0.5 - 0x1p-20)) : 0.0f;
  }
  return base;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The next smaller float32.
inline float below(float x) { return std::nextafter(x, -kInfinity); }

// Halfway to the next float32: what a real number must reach to be rounded to more than x.
inline double search_above(float x) {
  const float next = std::nextafter(x, kInfinity);
  if (x == -kInfinity || next == kInfinity) return x;
  return (static_cast<double>(x) + static_cast<double>(next)) / 2;
}

// A query as the passes see it: divisor * unit, its scores being `unit_score` times those of the unit.
struct SearchQuery {
  double norm, divisor, unit_score, center = 0, error;  // center: the product with the center
  bool bounded;
  SearchCodes codes = {};

  SearchQuery(const float* row, int64_t dim, int64_t metric) : error(search_error(dim)) {
    norm = kernels().search.norm(row, dim);
    divisor = unit_score = norm > 0 ? norm : 1;
    if (metric == kCosine) unit_score = norm > 0 && norm < kSearchEps ? norm / kSearchEps : 1;
    if (metric == kEuclidean) divisor = unit_score = std::max(norm, 1e-10);
    const double most = metric == kCosine ? kSearchMostBounded : metric == kDot ? 1e30 : 1e15;
    bounded = norm <= most;
    if (!bounded) divisor = unit_score = 1;
  }
  // What the best a pair can be must reach, in units of the query, for its score to be rounded to more than `score`.
  double limit(int64_t metric, float score) const {
    if (!bounded) return -std::numeric_limits<double>::infinity();
    const double least = search_above(score);
    if (metric != kEuclidean) return least / unit_score;
    if (least > 0) return std::numeric_limits<double>::infinity();
    const double square = norm * norm, other = least * least;
    return (square - other - error * (square + other)) / (2 * unit_score);
  }
};

// The queries of a pass side by side, in units of their scale, and what their bounds must exceed.
struct SearchPass {
  std::vector<uint32_t> codes;
  std::vector<int32_t> start;
  std::vector<float> length, error, center, tilt, square, limit;
  std::vector<double> scale, aim, shift, bend;  // limits without a base, and what goes with it and with its square
  double base = -1;                             // that `limit` is for

  void resize(int64_t count, int64_t words) {
    codes.resize(count * words);
    start.resize(count);
    for (auto* values : {&length, &error, &center, &tilt, &square, &limit}) values->resize(count);
    for (auto* values : {&scale, &aim, &shift, &bend}) values->resize(count);
    base = -1;
  }
  void set(int64_t n, const SearchQuery& q, const SearchCodes& c) {
    constexpr double up = 1 + 0x1p-20;
    scale[n] = c.scale > 0 ? c.scale : 1;
    length[n] = q.bounded ? static_cast<float>((c.height + c.residual) / scale[n] * up) : std::nanf("");
    error[n] = static_cast<float>(c.residual / scale[n] * up);
    tilt[n] = q.norm > 0 ? static_cast<float>(1 / scale[n]) : 0.0f;
    square[n] = static_cast<float>(1 / (q.unit_score * scale[n]));
    shift[n] = q.center / scale[n];
    center[n] = static_cast<float>(shift[n] + std::fabs(shift[n]) * 0x1p-19);  // of weights above the base
    bend[n] = 0.5 / (q.unit_score * scale[n]);
    start[n] = -128 * c.sum;
  }
  void set_aim(int64_t n, const SearchQuery& q, int64_t metric, float score) {
    aim[n] = std::min(std::max(q.limit(metric, score) / scale[n], -1e300), 1e300);
    base = -1;
  }
  // Limits for rows that weigh `base` at least.
  void set_base(double weight, int64_t metric, double rounding) {
    if (weight == base) return;
    base = weight;
    for (size_t n = 0; n < aim.size(); ++n) limit[n] = limit_of(static_cast<int64_t>(n), weight, metric, rounding);
  }
  float limit_of(int64_t n, double weight, int64_t metric, double rounding) const {
    constexpr double most = std::numeric_limits<float>::max();
    const double curve = metric == kEuclidean ? weight * weight : 0;
    const double moved = weight * shift[n], bent = curve * bend[n], x = aim[n] - moved + bent;
    const double slack = rounding * (std::fabs(aim[n]) + std::fabs(moved) + bent) + std::fabs(x) * 0x1p-22 + 1e-37;
    return static_cast<float>(std::min(std::max(x - slack, -most), most));
  }
};

}  // namespace sentfast::cpu
