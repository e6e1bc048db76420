// Rows of a contrastive loss and their gradient against plain double loops.
#pragma once

#include "similarity_test.h"

namespace check {

// One direction with everything drawn, and its scores as they were.
struct RandomSegment {
  Buffer<float> scores{0}, products{0}, guide{0}, row_scale{0}, column_scale{0};
  Buffer<int32_t> ids{0};
  std::vector<double> before;
  ContrastiveSegment segment = {};

  RandomSegment(int64_t rows, bool first, bool guided, int64_t group, float scale) {
    ContrastiveSegment& s = segment;
    s.period = integer(rows, rows + 3);
    s.own = integer(0, s.period - rows);
    s.columns = first ? s.period + integer(0, 40) : integer(s.own + rows, s.period + 40);
    s.positive = first || integer(0, 1) == 0;
    s.group = group;
    scores = random<float>(rows * s.columns);
    before.assign(scores.get(), scores.get() + scores.n);
    s.scores = scores.get();
    if (guided) {
      guide = random<float>(rows * s.columns);
      s.guide = guide.get();
    }
    if (integer(0, 1) == 0) {
      ids = Buffer<int32_t>(s.columns);
      for (int64_t j = 0; j < s.columns; ++j) ids[j] = static_cast<int32_t>(integer(0, s.columns / 2));
      s.ids = ids.get();
    }
    if (integer(0, 1) == 0) {
      row_scale = random<float>(rows);
      column_scale = random<float>(s.columns);
      s.row_scale = row_scale.get();
      s.column_scale = column_scale.get();
      if (integer(0, 1) == 0) start_from_products(rows);
    }
    s.factor = s.positive_factor = s.negatives_factor = scale;
    if (first && integer(0, 1) == 0) {
      s.factor = scale + static_cast<float>(integer(0, 1));
      s.negatives_factor = scale + static_cast<float>(integer(0, 1));
    }
  }

  // What lies in the place of the scores is not read then.
  void start_from_products(int64_t rows) {
    ContrastiveSegment& s = segment;
    products = random<float>(rows * s.columns);
    s.products = products.get();
    for (int64_t at = 0; at < rows * s.columns; ++at) {
      before[static_cast<size_t>(at)] =
          static_cast<double>(products[at]) * row_scale[at / s.columns] * column_scale[at % s.columns];
    }
  }

  bool left_out(int64_t i, int64_t j, double limit) const {
    const ContrastiveSegment& s = segment;
    const int64_t own = s.own + i;
    const bool duplicate = s.ids != nullptr && j != own && s.ids[j] == s.ids[own];
    if (s.positive && j == own) return false;
    if (s.guide != nullptr) return duplicate || s.guide[i * s.columns + j] > limit;
    return duplicate || (!s.positive && j % s.period == own);
  }
  double logit(int64_t i, int64_t j) const {
    const ContrastiveSegment& s = segment;
    const double factor = j == s.own + i              ? s.positive_factor
                          : j % s.period == s.own + i ? s.negatives_factor
                                                      : s.factor;
    return factor * before[static_cast<size_t>(i * s.columns + j)];
  }
};

inline void check_contrastive_row(const Contrastive& p, const std::vector<RandomSegment>& segments, int64_t i) {
  const ContrastiveSegment& first = segments[0].segment;
  double limit = 0;
  if (first.guide != nullptr) {
    const float positive = first.guide[i * first.columns + first.own + i];
    limit = positive - (p.relative ? std::fabs(positive) * p.margin : p.margin);
  }
  std::vector<double> sums(static_cast<size_t>(p.group_count));
  for (const RandomSegment& s : segments) {
    for (int64_t j = 0; j < s.segment.columns; ++j) {
      if (!s.left_out(i, j, limit)) sums[static_cast<size_t>(s.segment.group)] += std::exp(s.logit(i, j));
    }
  }
  double loss = -segments[0].logit(i, first.own + i), slope = 0;
  for (const double sum : sums) loss += std::log(sum) / static_cast<double>(p.group_count);
  close("contrastive, loss", p.losses[i], loss, 2e-6, 20);
  if (p.weights == nullptr) return;
  for (const RandomSegment& s : segments) {
    for (int64_t j = 0; j < s.segment.columns; ++j) {
      const auto group = static_cast<size_t>(s.segment.group);
      double share = 0;
      if (!s.left_out(i, j, limit)) share = std::exp(s.logit(i, j)) / sums[group] / static_cast<double>(p.group_count);
      if (&s == segments.data() && j == first.own + i) share -= 1;
      slope += share * s.before[static_cast<size_t>(i * s.segment.columns + j)];
      double want = share * p.weights[i] * p.scale;
      if (s.segment.row_scale != nullptr) {
        want *= static_cast<double>(s.segment.row_scale[i]) * static_cast<double>(s.segment.column_scale[j]);
      }
      close("contrastive, gradient", s.scores[i * s.segment.columns + j], want, 2e-5, 20);
    }
  }
  close("contrastive, slope", p.slopes[i], slope, 2e-5, 20);
}

inline void test_contrastive() {
  const int64_t rows = integer(1, 9), count = integer(1, kContrastiveSegments);
  const bool guided = integer(0, 2) == 0, apart = integer(0, 1) == 0;
  const float scale = 0.5f + std::fabs(normal());
  std::vector<RandomSegment> segments;
  for (int64_t n = 0; n < count; ++n) segments.emplace_back(rows, n == 0, guided, apart ? n : 0, scale);
  // A group needs a candidate that is always there.
  if (apart) {
    for (RandomSegment& s : segments) s.segment.positive = true;
  }
  const Buffer<float> weights = random<float>(rows), losses(rows), slopes(rows);
  Contrastive p = {};
  p.segment_count = count;
  p.group_count = apart ? count : 1;
  p.scale = scale;
  p.relative = integer(0, 1) == 0;
  p.margin = 0.1f * normal();
  if (integer(0, 2) != 0) p.weights = weights.get();
  p.losses = losses.get();
  p.slopes = slopes.get();
  for (int64_t n = 0; n < count; ++n) p.segments[n] = segments[static_cast<size_t>(n)].segment;
  in_threads(rows, [&](int64_t begin, int64_t end) { kernels().contrastive(p, begin, end); });
  for (int64_t i = 0; i < rows; ++i) check_contrastive_row(p, segments, i);
}

inline void test_moments() {
  const int64_t rows = integer(1, 9), columns = integer(1, 2 * kMomentColumns + 9);
  const int64_t panels = (columns + kMomentColumns - 1) / kMomentColumns;
  const Buffer<float> a = random<float>(rows * columns), b = random<float>(rows * columns);
  const Buffer<float> of_rows(panels * rows), of_columns(columns);
  const Moments p = {rows, columns, a.get(), b.get(), of_rows.get(), of_columns.get()};
  in_threads(panels, [&](int64_t begin, int64_t end) { kernels().moments(p, begin, end); });
  for (int64_t j = 0; j < columns; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) sum += static_cast<double>(a[i * columns + j]) * b[i * columns + j];
    close("moments, column", of_columns[j], sum, 2e-6, 20);
  }
  for (int64_t at = 0; at < panels * rows; ++at) {
    const int64_t first = at / rows * kMomentColumns, last = std::min(first + kMomentColumns, columns);
    double sum = 0;
    for (int64_t j = first; j < last; ++j) {
      sum += static_cast<double>(a[at % rows * columns + j]) * b[at % rows * columns + j];
    }
    close("moments, row", of_rows[at], sum, 2e-6, 200);
  }
}

template <class T>
void test_project() {
  const int64_t rows = integer(1, 9), dim = integer(1, 70), stride = dim + integer(0, 3);
  const int64_t stride_gradient = dim + integer(0, 3), stride_out = dim + integer(0, 3);
  const Buffer<T> x = random<T>((rows - 1) * stride + dim), out(rows * stride_out);
  const Buffer<float> gradient = random<float>(rows * stride_gradient), along = random<float>(rows), norm(rows);
  for (int64_t i = 0; i < rows; ++i) norm[i] = integer(0, 3) == 0 ? 1e-13f : 0.5f + std::fabs(normal());
  const int64_t way = integer(0, 2);  // given, by the norm, nothing
  const Project p = {dim,
                     {x.get(), stride},
                     way == 1 ? norm.get() : nullptr,
                     way == 0 ? along.get() : nullptr,
                     {gradient.get(), stride_gradient},
                     out.get(),
                     stride_out,
                     1e-12f};
  in_threads(rows, [&](int64_t begin, int64_t end) { kernels().project[static_cast<int>(dtype<T>())](p, begin, end); });
  for (int64_t i = 0; i < rows; ++i) {
    double part = 0;
    for (int64_t d = 0; d < dim; ++d) part += widen(x[i * stride + d]) * gradient[i * stride_gradient + d];
    part = way == 1 && norm[i] > 1e-12f ? part / norm[i] / norm[i] : 0;
    if (way == 0) part = along[i];
    for (int64_t d = 0; d < dim; ++d) {
      const double want = gradient[i * stride_gradient + d] - part * widen(x[i * stride + d]);
      close("project", widen(out[i * stride_out + d]), want, tolerance<T>(), static_cast<double>(dim));
    }
  }
}

}  // namespace check
