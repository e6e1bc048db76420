// Normalisation, pairwise similarity and matrices against plain double implementations.
#pragma once

#include "check.h"

namespace check {

template <class T>
double dot(const T* a, const T* b, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += widen(a[d]) * widen(b[d]);
  return sum;
}

template <class T>
void test_normalize() {
  const int64_t rows = integer(1, 9), dim = integer(1, 70), stride = dim + integer(0, 3);
  const Buffer<T> x = random_rows<T>(rows, dim, stride), grad = random<T>(rows * dim);
  const Buffer<T> y(rows * dim), grad_x(rows * dim);
  const Buffer<float> norm(rows);
  const int index = static_cast<int>(dtype<T>());
  const Normalize p = {dim, {x.get(), stride}, y.get(), norm.get(), 1e-12f};
  in_threads(rows, [&](int64_t begin, int64_t end) { kernels().normalize[index](p, begin, end); });
  const NormalizeBackward q = {dim, {grad.get(), dim}, {x.get(), stride}, dtype<T>(), norm.get(), grad_x.get(), 1e-12f};
  in_threads(rows, [&](int64_t begin, int64_t end) { kernels().normalize_backward[index](q, begin, end); });
  for (int64_t i = 0; i < rows; ++i) {
    const T *xi = x.get() + i * stride, *gi = grad.get() + i * dim;
    const double n = std::fmax(std::sqrt(dot(xi, xi, dim)), 1e-12), along = dot(xi, gi, dim) / (n * n);
    close("norm", norm[i], n, 1e-5);
    for (int64_t d = 0; d < dim; ++d) {
      close("l2_normalize", widen(y[i * dim + d]), widen(xi[d]) / n, tolerance<T>());
      const double expected = within_range<T>((widen(gi[d]) - widen(xi[d]) * along) / n);
      close("l2_normalize_backward", widen(grad_x[i * dim + d]), expected, tolerance<T>(), 4 / n);
    }
  }
}

template <class T>
void test_pairwise(Metric metric) {
  const int64_t rows = integer(1, 9), dim = integer(1, 70);
  const Buffer<T> a = random_rows<T>(rows, dim, dim), b = random_rows<T>(rows, dim, dim);
  const Buffer<T> grad_a(rows * dim), grad_b(rows * dim);
  const Buffer<float> scores(rows), norm_a(rows), norm_b(rows), grad = random<float>(rows);
  const int index = static_cast<int>(dtype<T>());
  const Pairwise p = {dim, {a.get(), dim}, {b.get(), dim}, metric, 1e-12f, scores.get(), norm_a.get(), norm_b.get()};
  in_threads(rows, [&](int64_t begin, int64_t end) { kernels().pairwise[index](p, begin, end); });
  const PairwiseBackward q = {dim,          {a.get(), dim}, {b.get(), dim}, metric,       1e-12f,      grad.get(),
                              scores.get(), norm_a.get(),   norm_b.get(),   grad_a.get(), grad_b.get()};
  in_threads(rows, [&](int64_t begin, int64_t end) { kernels().pairwise_backward[index](q, begin, end); });
  for (int64_t i = 0; i < rows; ++i) {
    const T *ai = a.get() + i * dim, *bi = b.get() + i * dim;
    const double na = std::fmax(std::sqrt(dot(ai, ai, dim)), 1e-12), nb = std::fmax(std::sqrt(dot(bi, bi, dim)), 1e-12);
    const double ab = dot(ai, bi, dim);
    double l1 = 0, l2 = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double difference = widen(ai[d]) - widen(bi[d]);
      l1 += std::fabs(difference);
      l2 += difference * difference;
    }
    l2 = std::sqrt(l2);
    const double score = metric == kCosine ? ab / na / nb : metric == kDot ? ab : metric == kEuclidean ? -l2 : -l1;
    close("pairwise", scores[i], score, 1e-5, static_cast<double>(dim));
    for (int64_t d = 0; d < dim; ++d) {
      const double x = widen(ai[d]), y = widen(bi[d]), g = grad[i];
      double expected = g * y;
      if (metric == kCosine) expected = g * (y / nb - x / na * score) / na;
      if (metric == kEuclidean) expected = l2 == 0 ? 0 : -g * (x - y) / l2;
      if (metric == kManhattan) expected = -g * static_cast<double>((x > y) - (x < y));
      expected = within_range<T>(expected);
      close("pairwise_backward", widen(grad_a[i * dim + d]), expected, tolerance<T>(), 4 / (na < 1 ? na : 1));
    }
  }
}

// An operand [rows, depth] whose strides are drawn too.
template <class T>
struct RandomOperand {
  Buffer<T> data{0};
  Operand operand = {};

  RandomOperand(int64_t rows, int64_t depth) {
    const bool transposed = integer(0, 1) != 0;
    const int64_t gap = integer(1, 2);
    operand.stride_row = transposed ? gap : depth * gap + integer(0, 1);
    operand.stride_column = transposed ? rows * gap : gap;
    const int64_t last = (rows - 1) * operand.stride_row + (depth - 1) * operand.stride_column;
    data = random<T>(depth > 0 ? last + 1 : 0);
    operand.data = data.get();
  }
  double at(int64_t row, int64_t k) const { return widen(data[row * operand.stride_row + k * operand.stride_column]); }
};

template <class A, class B>
void test_matrix(bool scaled) {
  const bool few = integer(0, 3) == 0;
  const int64_t rows = few ? integer(1, kFewRows) : integer(1, 110);
  const int64_t columns = few ? integer(1, 300) : integer(1, 280),
                depth = integer(0, 3) == 0 ? integer(500, 530) : integer(0, few ? 300 : 40);
  const RandomOperand<A> a(rows, depth);
  const RandomOperand<B> b(columns, depth);
  const Buffer<float> c(rows * columns), norm_a(rows), norm_b(columns);
  for (int64_t i = 0; i < rows; ++i) norm_a[i] = 0.5f + std::fabs(normal());
  for (int64_t j = 0; j < columns; ++j) norm_b[j] = 0.5f + std::fabs(normal());
  Matrix m = {rows, columns, depth, a.operand, b.operand, c.get(), columns, nullptr, nullptr, 1e-12f};
  if (scaled) {
    m.norm_a = norm_a.get();
    m.norm_b = norm_b.get();
  }
  const MatrixFn kernel = kernels().matrix[static_cast<int>(dtype<A>())][static_cast<int>(dtype<B>())];
  in_threads((columns + kBlockColumns - 1) / kBlockColumns, [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(kMatrixScratch);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t stop = (block + 1) * kBlockColumns;
      kernel(m, {0, rows, block * kBlockColumns, stop < columns ? stop : columns}, scratch.get());
    }
  });
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += a.at(i, k) * b.at(j, k);
      if (scaled) sum /= static_cast<double>(norm_a[i]) * static_cast<double>(norm_b[j]);
      close("matrix", c[i * columns + j], sum, 2e-6, static_cast<double>(depth));
    }
  }
}

}  // namespace check
