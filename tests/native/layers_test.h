// The encoder's steps that go row by row against plain double loops.
#pragma once

#include "encoder_test.h"

namespace check {

struct NormRow {
  double mean = 0, variance = 0, size = 0;  // size: mean magnitude
  std::vector<double> sum;
};

inline NormRow norm_row(const float* y, const float* residual, int64_t dim) {
  NormRow row;
  for (int64_t d = 0; d < dim; ++d) {
    row.sum.push_back(y[d] + (residual != nullptr ? double{residual[d]} : 0.0));
    row.mean += row.sum.back() / static_cast<double>(dim);
    row.size += std::fabs(row.sum.back()) / static_cast<double>(dim);
  }
  for (const double x : row.sum) row.variance += (x - row.mean) * (x - row.mean) / static_cast<double>(dim);
  return row;
}

inline void test_layer_norm() {
  const int64_t rows = integer(1, 9), dim = integer(1, 200), n = rows * dim;
  const bool with_residual = integer(0, 1) == 0, with_weight = integer(0, 3) != 0, with_bias = integer(0, 2) != 0;
  const Buffer<float> y = random<float>(n), residual = random<float>(n), weight = random<float>(dim);
  const Buffer<float> bias = random<float>(dim), sum(n), normed(n);
  const Buffer<BFloat16> narrowed(n);
  // One row of a constant whose sums are exact: its variance is 0 and the result the bias alone.
  const int64_t constant = integer(0, rows - 1);
  for (int64_t d = 0; d < dim; ++d) {
    y[constant * dim + d] = 1.375f;
    residual[constant * dim + d] = -0.25f;
  }
  LayerNorm p = {dim,
                 y.get(),
                 with_residual ? residual.get() : nullptr,
                 with_weight ? weight.get() : nullptr,
                 nullptr,
                 1e-12f,
                 nullptr,
                 nullptr,
                 nullptr};
  if (with_bias) p.bias = bias.get();
  if (integer(0, 1) == 0) p.eps = 1e-5f;
  std::vector<NormRow> expected;
  for (int64_t i = 0; i < rows; ++i) {
    expected.push_back(norm_row(y.get() + i * dim, with_residual ? residual.get() + i * dim : nullptr, dim));
  }
  // As the encoder does it: the residual stream is read and written in place.
  float* const stream = with_residual ? residual.get() : y.get();
  switch (integer(0, 2)) {
    case 0:
      p.sum_out = stream;
      p.normed = normed.get();
      break;
    case 1:
      p.normed = stream;
      break;
    default:
      p.sum_out = sum.get();
  }
  if (integer(0, 1) == 0) p.normed_bfloat16 = narrowed.get();
  in_threads(rows, [&](int64_t begin, int64_t end) { kernels().layer_norm(p, begin, end); });
  for (int64_t i = 0; i < n; ++i) {
    const NormRow& row = expected[static_cast<size_t>(i / dim)];
    const int64_t d = i % dim;
    const double x = row.sum[static_cast<size_t>(d)], scale = 1 / std::sqrt(row.variance + p.eps);
    if (p.sum_out != nullptr) within("layer_norm, sum", p.sum_out[i], x, kRound * std::fabs(x));
    double want = x, bound = kRound * std::fabs(x);
    if (with_weight) {
      const double count = static_cast<double>(dim) + 4, shift = with_bias ? bias[d] : 0;
      const double turned = (x - row.mean) * scale * weight[d];
      want = turned + shift;
      bound = count * kRound * row.size * scale * std::fabs(weight[d]) + kRound * std::fabs(shift);
      bound += kRound * std::fabs(x) * scale * std::fabs(weight[d]) + count * kRound * std::fabs(turned);
      if (row.variance == 0) bound = kRound * std::fabs(shift);
    }
    if (p.normed != nullptr) within("layer_norm", p.normed[i], want, bound);
    if (p.normed_bfloat16 != nullptr) {
      within("layer_norm, bf16", widen(narrowed[i]), want, bound + kRoundBFloat16 * (std::fabs(want) + bound));
    }
  }
}

template <class T>
void test_embed() {
  const int64_t rows = integer(1, 9), dim = integer(1, 100);
  const int64_t counts_of[] = {integer(1, 9), integer(1, 9), integer(1, 3)};
  const bool with_positions = integer(0, 3) != 0, with_types = integer(0, 3) != 0, with_ids = integer(0, 2) != 0;
  const Buffer<T> words = random<T>(counts_of[0] * dim), positions = random<T>(counts_of[1] * dim);
  const Buffer<T> types = random<T>(counts_of[2] * dim);
  const Buffer<int32_t> ids(rows), position_ids(rows), type_ids(rows);
  for (int64_t i = 0; i < rows; ++i) {
    ids[i] = static_cast<int32_t>(integer(0, counts_of[0] - 1));
    position_ids[i] = static_cast<int32_t>(integer(0, counts_of[1] - 1));
    type_ids[i] = static_cast<int32_t>(integer(0, counts_of[2] - 1));
  }
  const Buffer<float> out(rows * dim);
  const Embed p = {dim,
                   ids.get(),
                   position_ids.get(),
                   with_ids ? type_ids.get() : nullptr,
                   words.get(),
                   with_positions ? positions.get() : nullptr,
                   with_types ? types.get() : nullptr,
                   out.get()};
  const EmbedFn kernel = kernels().embed[static_cast<int>(dtype<T>())];
  in_threads(rows, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < dim; ++d) {
      const double word = widen(words[ids[i] * dim + d]);
      const double position = with_positions ? widen(positions[position_ids[i] * dim + d]) : 0;
      const double type = with_types ? widen(types[(with_ids ? type_ids[i] : 0) * dim + d]) : 0;
      const double size = std::fabs(word) + std::fabs(position) + std::fabs(type);
      within("embed", out[i * dim + d], word + position + type, 2 * kRound * size);
    }
  }
}

template <class E>
void test_rotate() {
  const int64_t rows = integer(1, 9), heads = integer(1, 3), head_dim = 8 * integer(1, 9), half = head_dim / 2;
  const int64_t hidden = heads * head_dim, stride = 3 * hidden + integer(0, 3), positions = integer(1, 9);
  const Buffer<E> qkv = random<E>((rows - 1) * stride + 3 * hidden), before(qkv.n);
  std::copy(qkv.get(), qkv.get() + qkv.n, before.get());
  const Buffer<float> table = random<float>(positions * head_dim);
  const Buffer<int32_t> ids(rows);
  for (int64_t i = 0; i < rows; ++i) ids[i] = static_cast<int32_t>(integer(0, positions - 1));
  const Rotate p = {heads, head_dim, table.get(), ids.get(), qkv.get(), stride};
  in_threads(rows, [&](int64_t begin, int64_t end) { kernels().rotate[compute<E>()](p, begin, end); });
  for (int64_t i = 0; i < qkv.n; ++i) {
    const int64_t row = i / stride, column = i % stride, d = column % head_dim;
    double want = widen(before[i]), bound = 0;
    if (column < 2 * hidden) {
      const double other = widen(before[d < half ? i + half : i - half]) * (d < half ? -1 : 1);
      const float* angles = table.get() + ids[row] * head_dim + d % half;
      want = want * angles[0] + other * angles[half];
      bound = 2 * kRound * (std::fabs(widen(before[i]) * angles[0]) + std::fabs(other * angles[half]));
      bound += stored<E>() * (std::fabs(want) + bound);
    }
    within("rotate", widen(qkv[i]), want, bound);
  }
}

template <class E>
void test_gate() {
  const int64_t rows = integer(1, 9), dim = integer(1, 150), stride = 2 * dim + integer(0, 3);
  const Activation activation = any_activation();
  const Buffer<E> x = random<E>((rows - 1) * stride + 2 * dim), before(x.n);
  std::copy(x.get(), x.get() + x.n, before.get());
  const Gate p = {dim, activation, x.get(), stride};
  in_threads(rows, [&](int64_t begin, int64_t end) { kernels().gate[compute<E>()](p, begin, end); });
  for (int64_t i = 0; i < x.n; ++i) {
    double want = widen(before[i]), bound = 0;
    if (i % stride < dim) {
      const double factor = widen(before[i + dim]);
      bound = function_error<E>() * std::fabs(want * factor);
      want = activate(activation, want) * factor;
      bound += stored<E>() * (std::fabs(want) + bound);
    }
    within("gate", widen(x[i]), want, bound);
  }
}

template <class T>
void test_narrow() {
  const int64_t n = integer(1, 100);
  const Buffer<float> from(n);
  constexpr float odd[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-6f, 65519.0f, 1.00390625f};
  for (int64_t i = 0; i < n; ++i) from[i] = integer(0, 3) == 0 ? odd[integer(0, 7)] : normal();
  const Buffer<T> to(n);
  kernels().narrow[static_cast<int>(dtype<T>())](from.get(), to.get(), n);
  const double subnormal = dtype<T>() == Dtype::Float16 ? 1.0 / (1 << 25) : 0;
  const double rounding = dtype<T>() == Dtype::Float32 ? 0 : stored<T>();
  for (int64_t i = 0; i < n; ++i) {
    within("narrow", widen(to[i]), from[i], std::max(rounding * std::fabs(from[i]), subnormal));
  }
}

}  // namespace check
