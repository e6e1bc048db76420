// l2_normalize and pairwise_similarity with their gradients, against plain loops in double.
#include <algorithm>

#include "arrays.h"
#include "similarity.cuh"

namespace driver {
namespace {

using namespace sentfast;

constexpr Dtype kDtypes[] = {Dtype::kFloat, Dtype::kBFloat16, Dtype::kHalf};

struct Shape {
  // Two leading dimensions and the row length.
  std::vector<int64_t> size;
  Layout layout;
  std::string name(const char* operation, Dtype dtype) const {
    return std::string(operation) + " " + name_of(dtype) + " " + std::to_string(size[0]) + "x" +
           std::to_string(size[1]) + "x" + std::to_string(size[2]) + " layout" +
           std::to_string(static_cast<int>(layout));
  }
  int64_t rows() const { return size[0] * size[1]; }
  int64_t dim() const { return size[2]; }
};

const std::vector<Shape> kShapes = {
    {{1, 1, 1}, Layout::kContiguous},   {{2, 3, 8}, Layout::kContiguous}, {{3, 5, 384}, Layout::kWideRows},
    {{2, 14, 67}, Layout::kTransposed}, {{1, 30, 48}, Layout::kOffset},   {{7, 1, 1032}, Layout::kContiguous},
    {{3, 17, 16}, Layout::kTransposed}, {{2, 0, 8}, Layout::kContiguous}, {{2, 2, 0}, Layout::kContiguous},
};

double dot(const Array& a, const Array& b, int64_t row, int64_t dim) {
  double sum = 0;
  for (int64_t c = 0; c < dim; ++c) sum += a[row * dim + c] * b[row * dim + c];
  return sum;
}

// Rows that are special: zero, tiny, and one with NaN.
void make_special(Array& x) {
  if (x.count() == 0) return;
  for (int64_t c = 0; c < x.size[2]; ++c) x.set({0, 0, c}, 0);
  for (int64_t c = 0; c < x.size[2]; ++c) x.set({x.size[0] - 1, x.size[1] - 1, c}, x.dtype == Dtype::kHalf ? 0 : 1e-15);
  if (x.size[1] > 4) x.set({0, 4, x.size[2] / 2}, NAN);
}

double normalize_grad(double g, double y, double along, double norm, double eps) {
  return norm < eps ? g / eps : (g - y * along) / norm;
}

void test_normalize(const Shape& shape, Dtype dtype, Dtype grad_dtype, double eps) {
  ++cases;
  const std::string name = shape.name("l2_normalize", dtype) + " grad " + name_of(grad_dtype);
  const int64_t rows = shape.rows(), dim = shape.dim();
  Array x(dtype, shape.size, shape.layout), y(dtype, shape.size), norm(Dtype::kFloat, {shape.size[0], shape.size[1]});
  x.fill_random();
  make_special(x);
  NormalizeArguments a{};
  expect(collapse<1>(2, x.size.data(), {x.stride.data()}, a.rows), name + " collapse", 0, 1, 0);
  a.dim = dim;
  a.x = x.data();
  a.x_stride = x.stride[2];
  a.y = y.data();
  a.norm = static_cast<float*>(norm.data());
  a.eps = static_cast<float>(eps);
  expect_success(name, run_l2_normalize(dtype, dtype, a, nullptr));
  std::vector<double> want_y, want_norm;
  for (int64_t r = 0; r < rows; ++r) {
    want_norm.push_back(sqrt(dot(x, x, r, dim)));
    const double norm_r = isnan(want_norm[r]) ? NAN : std::max(want_norm[r], eps);
    for (int64_t c = 0; c < dim; ++c) want_y.push_back(x[r * dim + c] / norm_r);
  }
  expect_near(name + " y", y, want_y);
  expect_near(name + " norm", norm, want_norm);

  Array grad(grad_dtype, shape.size, shape.layout), grad_x(dtype, shape.size);
  grad.fill_random();
  NormalizeBackwardArguments b{};
  expect(collapse<3>(2, x.size.data(), {grad.stride.data(), x.stride.data(), norm.stride.data()}, b.rows),
         name + " collapse", 0, 1, 0);
  b.dim = dim;
  b.grad = grad.data();
  b.grad_stride = grad.stride[2];
  b.x = x.data();
  b.x_stride = x.stride[2];
  b.norm = static_cast<const float*>(norm.data());
  b.grad_x = grad_x.data();
  b.eps = static_cast<float>(eps);
  expect_success(name, run_l2_normalize_backward(dtype, grad_dtype, b, nullptr));
  std::vector<double> want;
  for (int64_t r = 0; r < rows; ++r) {
    const double norm_r = norm[r], size = isnan(norm_r) ? NAN : std::max(norm_r, eps);
    const double along = dot(x, grad, r, dim) / size;
    for (int64_t c = 0; c < dim; ++c) {
      want.push_back(normalize_grad(grad[r * dim + c], x[r * dim + c] / size, along, norm_r, eps));
    }
  }
  expect_near(name + " grad_x", grad_x, want);
}

double pairwise(int metric, const Array& a, const Array& b, int64_t row, int64_t dim, double eps) {
  if (metric == kDot) return dot(a, b, row, dim);
  if (metric == kCosine) {
    const double norm_a = sqrt(dot(a, a, row, dim)), norm_b = sqrt(dot(b, b, row, dim));
    return dot(a, b, row, dim) / (norm_a < eps ? eps : norm_a) / (norm_b < eps ? eps : norm_b);
  }
  double sum = 0;
  for (int64_t c = 0; c < dim; ++c) {
    const double d = a[row * dim + c] - b[row * dim + c];
    sum += metric == kEuclidean ? d * d : fabs(d);
  }
  return metric == kEuclidean ? -sqrt(sum) : -sum;
}

// The gradient to x of one element, y being the other operand's.
double pairwise_grad(int metric, double g, double x, double y, double score, double norm_x, double norm_y, double eps,
                     double sign) {
  if (metric == kDot) return g * y;
  if (metric == kCosine) {
    const double unit_x = x / (norm_x < eps ? eps : norm_x), unit_y = y / (norm_y < eps ? eps : norm_y);
    return normalize_grad(g * unit_y, unit_x, g * score, norm_x, eps);
  }
  const double d = sign * (x - y);
  if (metric == kEuclidean) return score == 0 ? 0 : sign * g * d / score;
  return -sign * g * ((d > 0) - (d < 0));
}

void test_pairwise(const Shape& shape, Dtype dtype, Dtype grad_dtype, int metric) {
  ++cases;
  const double eps = 1e-12;
  const std::string name = shape.name("pairwise", dtype) + " metric" + std::to_string(metric);
  const int64_t rows = shape.rows(), dim = shape.dim();
  Array a(dtype, shape.size, shape.layout), b(dtype, shape.size);
  a.fill_random();
  b.fill_random();
  // One pair of equal rows; the special rows of a make zero norms.
  if (rows > 1 && dim > 0) {
    for (int64_t c = 0; c < dim; ++c) b.set({shape.size[0] - 1, 0, c}, a.get({shape.size[0] - 1, 0, c}));
  }
  if (metric == kCosine) make_special(a);
  const std::vector<int64_t> lead = {shape.size[0], shape.size[1]};
  Array scores(Dtype::kFloat, lead), norm_a(Dtype::kFloat, lead), norm_b(Dtype::kFloat, lead);
  PairwiseArguments p{};
  expect(collapse<2>(2, a.size.data(), {a.stride.data(), b.stride.data()}, p.rows), name + " collapse", 0, 1, 0);
  p.dim = dim;
  p.metric = static_cast<PairwiseMetric>(metric);
  p.a = a.data();
  p.a_stride = a.stride[2];
  p.b = b.data();
  p.b_stride = b.stride[2];
  p.scores = static_cast<float*>(scores.data());
  p.norm_a = metric == kCosine ? static_cast<float*>(norm_a.data()) : nullptr;
  p.norm_b = metric == kCosine ? static_cast<float*>(norm_b.data()) : nullptr;
  p.eps = static_cast<float>(eps);
  expect_success(name, run_pairwise_similarity(dtype, p, nullptr));
  std::vector<double> want, want_a, want_b;
  for (int64_t r = 0; r < rows; ++r) {
    want.push_back(pairwise(metric, a, b, r, dim, eps));
    want_a.push_back(sqrt(dot(a, a, r, dim)));
    want_b.push_back(sqrt(dot(b, b, r, dim)));
  }
  expect_near(name + " scores", scores, want, static_cast<double>(dim) / 4);
  if (metric == kCosine) {
    expect_near(name + " norm_a", norm_a, want_a);
    expect_near(name + " norm_b", norm_b, want_b);
  }

  // The gradient of the scores, broadcast over the first dimension as a sum's is.
  Array grad(grad_dtype, {shape.size[1]});
  grad.fill_random();
  const int64_t grad_stride[2] = {0, 1};
  Array grad_a(dtype, shape.size), grad_b(dtype, shape.size);
  PairwiseBackwardArguments g{};
  expect(collapse<6>(2, a.size.data(),
                     {a.stride.data(), b.stride.data(), grad_stride, scores.stride.data(), norm_a.stride.data(),
                      norm_b.stride.data()},
                     g.rows),
         name + " collapse", 0, 1, 0);
  g.dim = dim;
  g.metric = p.metric;
  g.a = p.a;
  g.a_stride = p.a_stride;
  g.b = p.b;
  g.b_stride = p.b_stride;
  g.grad = grad.data();
  g.grad_dtype = grad_dtype;
  g.scores = p.scores;
  g.norm_a = p.norm_a;
  g.norm_b = p.norm_b;
  g.grad_a = grad_a.data();
  g.grad_b = grad_b.data();
  g.eps = p.eps;
  expect_success(name, run_pairwise_similarity_backward(dtype, g, nullptr));
  std::vector<double> want_grad_a, want_grad_b;
  for (int64_t r = 0; r < rows; ++r) {
    const double gr = grad[r % shape.size[1]], s = scores[r];
    const double na = metric == kCosine ? norm_a[r] : 0, nb = metric == kCosine ? norm_b[r] : 0;
    for (int64_t c = 0; c < dim; ++c) {
      const double x = a[r * dim + c], y = b[r * dim + c];
      want_grad_a.push_back(pairwise_grad(metric, gr, x, y, s, na, nb, eps, 1));
      want_grad_b.push_back(pairwise_grad(metric, gr, y, x, s, nb, na, eps, -1));
    }
  }
  expect_near(name + " grad_a", grad_a, want_grad_a);
  expect_near(name + " grad_b", grad_b, want_grad_b);
}

// Rows of four dimensions that do not join, through the function that finds their offsets.
void test_rows() {
  ++cases;
  const int64_t size[4] = {3, 1, 4, 5}, a[4] = {300, 7, 50, 3}, b[4] = {20, 20, 5, 1};
  Rows<2> rows;
  expect(collapse<2>(4, size, {a, b}, rows) && rows.dims == 3, "rows dims", rows.dims, 3, 0);
  for (int64_t row = 0; row < 60; ++row) {
    int64_t offset[2];
    rows.offsets(row, offset);
    const int64_t want = row / 20 * 300 + row / 5 % 4 * 50 + row % 5 * 3;
    expect(offset[0] == want, "rows offset a", static_cast<double>(offset[0]), static_cast<double>(want), row);
    expect(offset[1] == row, "rows offset b", static_cast<double>(offset[1]), static_cast<double>(row), row);
  }
  const int64_t many[10] = {2, 2, 2, 2, 2, 2, 2, 2, 2, 2}, gaps[10] = {1, 3, 7, 15, 31, 63, 127, 255, 511, 1023};
  Rows<1> one;
  expect(!collapse<1>(10, many, {gaps}, one), "rows too many", 1, 0, 0);
}

}  // namespace

void test_similarity() {
  test_rows();
  for (const Shape& shape : kShapes) {
    for (const Dtype dtype : kDtypes) {
      for (const Dtype grad_dtype : kDtypes) test_normalize(shape, dtype, grad_dtype, 1e-12);
      test_normalize(shape, dtype, Dtype::kFloat, 3.0);
      for (int metric = 0; metric < 4; ++metric) test_pairwise(shape, dtype, kDtypes[metric % 3], metric);
    }
  }
}

}  // namespace driver
