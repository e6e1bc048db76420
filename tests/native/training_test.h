// The kernels of training against plain double loops: dropout, layer norm, activation, the gradient of attention.
#pragma once

#include "encoder_test.h"

namespace check {

// ---- dropout ----

// The generator as its paper has it, one counter at a time.
inline void philox(const uint32_t (&counter)[4], uint64_t seed, uint32_t (&x)[4]) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int i = 0; i < 4; ++i) x[i] = counter[i];
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * x[0], b = uint64_t{0xCD9E8D57u} * x[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ x[3] ^ key[1], static_cast<uint32_t>(a)};
    for (int i = 0; i < 4; ++i) x[i] = next[i];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
}

inline bool stays(const Dropout& p, int64_t row, int64_t head, int64_t column) {
  if (p.threshold == 0) return true;
  const uint32_t counter[4] = {static_cast<uint32_t>(column / 64 * 16 + column % 16), static_cast<uint32_t>(row),
                               static_cast<uint32_t>(head), p.stream};
  uint32_t x[4];
  philox(counter, p.seed, x);
  return x[column / 16 % 4] >= p.threshold;
}

inline double dropped(const Dropout& p, int64_t row, int64_t head, int64_t column, double x) {
  return !stays(p, row, head, column) ? 0.0 : p.threshold == 0 ? x : x * p.scale;
}

inline Dropout random_dropout() {
  Dropout p = {generator()(), static_cast<uint32_t>(generator()()), 0, 1.0f};
  if (integer(0, 2) == 0) return p;
  p.threshold = static_cast<uint32_t>(integer(1, int64_t{3} << 30));
  p.scale = static_cast<float>(1.0 / (1.0 - p.threshold / 4294967296.0));
  return p;
}

template <class T>
void test_dropout() {
  const int64_t rows = integer(1, 5), dim = integer(1, 150), stride = dim + integer(0, 3);
  const Buffer<T> x = random<T>((rows - 1) * stride + dim), y(rows * dim);
  const DropoutRows p = {dim, {x.get(), stride}, y.get(), random_dropout()};
  in_threads(rows, [&](int64_t begin, int64_t end) { kernels().dropout[static_cast<int>(dtype<T>())](p, begin, end); });
  for (int64_t i = 0; i < rows * dim; ++i) {
    const double want = dropped(p.dropout, i / dim, 0, i % dim, widen(x[i / dim * stride + i % dim]));
    within("dropout", widen(y[i]), want, 2 * stored<T>() * std::fabs(want) + kRound * std::fabs(want));
  }
}

// ---- layer norm ----

template <class X, class R>
void test_norm() {
  const int64_t rows = integer(1, 150), dim = integer(2, 100), n = rows * dim;
  const Buffer<X> x = random<X>(n), grad_x(n);
  const Buffer<R> residual = random<R>(n), grad = random<R>(n), y(n), sum(n), grad_sum(n);
  const Buffer<float> weight = random<float>(dim), bias = random<float>(dim), mean(rows), rstd(rows);
  const bool with_residual = integer(0, 1) == 0, with_bias = integer(0, 1) == 0;
  const Dropout dropout = random_dropout();
  const DropoutAddLayerNorm p = {dim,
                                 {x.get(), dim},
                                 {with_residual ? residual.get() : nullptr, dim},
                                 weight.get(),
                                 with_bias ? bias.get() : nullptr,
                                 1e-5f,
                                 dropout,
                                 y.get(),
                                 sum.get(),
                                 mean.get(),
                                 rstd.get()};
  const int wide = dtype<R>() == Dtype::Float32 ? 1 : 0, index = static_cast<int>(dtype<X>());
  in_threads(rows, [&](int64_t begin, int64_t end) { kernels().dropout_add_layer_norm[index][wide](p, begin, end); });
  const int64_t blocks = (rows + kPartialRows - 1) / kPartialRows;
  const Buffer<float> partial(blocks * 2 * dim);
  const bool same = dropout.threshold == 0 && dtype<X>() == dtype<R>();
  const DropoutAddLayerNormBackward b = {
      rows,         dim,          {grad.get(), dim}, sum.get(),      mean.get(),
      rstd.get(),   weight.get(), dropout,           grad_sum.get(), same ? nullptr : grad_x.get(),
      partial.get()};
  in_threads(blocks, [&](int64_t begin, int64_t end) {
    kernels().dropout_add_layer_norm_backward[index][wide](b, begin, end);
  });
  const double half = tolerance<R>(), allowed = std::fmax(tolerance<X>(), half);
  std::vector<double> sums(static_cast<size_t>(2 * dim));
  for (int64_t i = 0; i < rows; ++i) {
    double middle = 0, variance = 0, g_mean = 0, along = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t at = i * dim + d;
      const double want = dropped(dropout, i, 0, d, widen(x[at])) + (with_residual ? widen(residual[at]) : 0.0);
      close("norm, sum", widen(sum[at]), want, allowed);
      middle += widen(sum[at]) / static_cast<double>(dim);
    }
    for (int64_t d = 0; d < dim; ++d) {
      const double x_hat = widen(sum[i * dim + d]) - middle;
      variance += x_hat * x_hat / static_cast<double>(dim);
    }
    const double scale = 1 / std::sqrt(variance + 1e-5);
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t at = i * dim + d;
      const double z = (widen(sum[at]) - middle) * scale, g = widen(grad[at]);
      close("norm", widen(y[at]), z * weight[d] + (with_bias ? bias[d] : 0.0), allowed, std::fmax(scale, 4.0));
      g_mean += g * weight[d] / static_cast<double>(dim);
      along += g * weight[d] * z / static_cast<double>(dim);
      sums[static_cast<size_t>(d)] += g * z;
      sums[static_cast<size_t>(dim + d)] += g;
    }
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t at = i * dim + d;
      const double z = (widen(sum[at]) - middle) * scale,
                   want = (widen(grad[at]) * weight[d] - g_mean - z * along) * scale;
      close("norm, gradient of the sum", widen(grad_sum[at]), want, half, 10 * scale * scale);
      if (same) continue;
      close("norm, gradient of x", widen(grad_x[at]), dropped(dropout, i, 0, d, want), allowed,
            10 * scale * scale * dropout.scale);
    }
  }
  for (int64_t d = 0; d < 2 * dim; ++d) {
    double got = 0;
    for (int64_t block = 0; block < blocks; ++block) got += partial[block * 2 * dim + d];
    close("norm, gradient of the weight", got, sums[static_cast<size_t>(d)], 1e-4, static_cast<double>(rows) * 10);
  }
}

// ---- activation ----

inline double derivative(Activation activation, double x) {
  const double h = 1e-5;
  if (activation == kRelu) return x > 0 ? 1 : 0;
  return (activate(activation, x + h) - activate(activation, x - h)) / (2 * h);
}

template <class T>
void test_bias_activation() {
  const int64_t rows = integer(1, 140), dim = integer(1, 90), n = rows * dim;
  const Buffer<T> x = random<T>(n), grad = random<T>(n), y(n), grad_x(n);
  const Buffer<float> bias = random<float>(dim);
  const bool with_bias = integer(0, 1) == 0;
  const int64_t blocks = (rows + kPartialRows - 1) / kPartialRows;
  const Buffer<float> partial(blocks * dim);
  for (const Activation activation : {kGelu, kGeluTanh, kRelu, kSilu}) {
    BiasActivation p = {rows,       dim,     {x.get(), dim}, {grad.get(), dim}, with_bias ? bias.get() : nullptr,
                        activation, y.get(), nullptr};
    const int index = static_cast<int>(dtype<T>());
    in_threads(rows, [&](int64_t begin, int64_t end) { kernels().bias_activation[index](p, begin, end); });
    p.y = grad_x.get();
    p.partial = with_bias ? partial.get() : nullptr;
    in_threads(blocks, [&](int64_t begin, int64_t end) { kernels().bias_activation_backward[index](p, begin, end); });
    for (int64_t i = 0; i < n; ++i) {
      const double z = widen(x[i]) + (with_bias ? bias[i % dim] : 0.0);
      close("bias and activation", widen(y[i]), activate(activation, z), tolerance<T>());
      close("its gradient", widen(grad_x[i]), widen(grad[i]) * derivative(activation, z), 2 * tolerance<T>(), 4);
    }
    for (int64_t d = 0; with_bias && d < dim; ++d) {
      double got = 0, want = 0;
      for (int64_t block = 0; block < blocks; ++block) got += partial[block * dim + d];
      for (int64_t i = 0; i < rows; ++i)
        want += widen(grad[i * dim + d]) * derivative(activation, widen(x[i * dim + d]) + bias[d]);
      close("gradient of the bias", got, want, 2 * tolerance<T>(), static_cast<double>(rows) * 4);
    }
  }
}

// ---- product ----

// a and b in either layout, exactly as large as they must be; c with a gap after each row.
inline void test_product() {
  const int64_t rows = integer(1, kProductRows + 20), columns = integer(1, 150),
                depth = integer(0, 2 * kProductSteps + 9);
  const bool turned_a = integer(0, 1) == 0, turned_b = integer(0, 1) == 0, with_bias = integer(0, 1) == 0;
  const int64_t stride_c = columns + integer(0, 2);
  const Buffer<float> a = random<float>(rows * depth), b = random<float>(depth * columns),
                      bias = random<float>(columns);
  const Buffer<float> c((rows - 1) * stride_c + columns);
  fill_with(c, kGuard);
  const Product p = {rows,
                     columns,
                     depth,
                     a.get(),
                     turned_a ? 1 : depth,
                     turned_a ? rows : 1,
                     b.get(),
                     turned_b ? 1 : columns,
                     turned_b ? depth : 1,
                     with_bias ? bias.get() : nullptr,
                     c.get(),
                     stride_c};
  const int64_t middle = integer(1, (columns + kPanel - 1) / kPanel) * kPanel, half = std::min(rows, kProductRows);
  in_threads(4, [&](int64_t begin, int64_t end) {
    const Buffer<float> scratch(kProductScratch);
    for (int64_t task = begin; task < end; ++task) {
      const Block block = {task / 2 == 0 ? 0 : half, task / 2 == 0 ? half : rows,
                           task % 2 == 0 ? 0 : std::min(middle, columns),
                           task % 2 == 0 ? std::min(middle, columns) : columns};
      if (block.row_begin < block.row_end && block.column_begin < block.column_end) {
        kernels().product(p, block, scratch.get());
      }
    }
  });
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double want = with_bias ? bias[j] : 0.0, size = std::fabs(want);
      for (int64_t s = 0; s < depth; ++s) {
        const double term = double{a[i * p.a_row + s * p.a_step]} * b[s * p.b_step + j * p.b_column];
        want += term;
        size += std::fabs(term);
      }
      within("product", c[i * stride_c + j], want, static_cast<double>(depth + 2) * kRound * size);
    }
    for (int64_t j = columns; i + 1 < rows && j < stride_c; ++j) untouched("product, gap", c[i * stride_c + j]);
  }
}

// ---- attention ----

// The gradients of one head of one sequence: rows of q, k, v and out, then sums by distance.
struct HeadGradient {
  std::vector<double> q, k, v, bias;
};

template <class E>
HeadGradient head_gradient(const AttentionCase<E>& c, const Dropout& dropout, const Buffer<E>& grad, int64_t sequence,
                           int64_t head) {
  const Attention& p = c.p;
  const int64_t start = c.cu_seqlens[sequence], length = c.cu_seqlens[sequence + 1] - start, dim = p.head_dim;
  const auto size = static_cast<size_t>(length * dim);
  HeadGradient result = {std::vector<double>(size), std::vector<double>(size), std::vector<double>(size),
                         std::vector<double>(static_cast<size_t>(2 * p.bias_reach + 1))};
  for (int64_t i = 0; i < length; ++i) {
    const int64_t first = p.left < 0 ? 0 : std::max<int64_t>(0, i - p.left);
    const int64_t last = p.right < 0 ? length : std::min(length, i + p.right + 1);
    std::vector<double> weight(static_cast<size_t>(length)), grad_p(static_cast<size_t>(length));
    double top = -INFINITY, total = 0, delta = 0;
    const auto g = [&](int64_t d) { return widen(grad[((start + i) * p.heads + head) * dim + d]); };
    for (int64_t j = first; j < last; ++j) {
      double score = 0;
      for (int64_t d = 0; d < dim; ++d) score += c.at(start + i, 0, head, d) * c.at(start + j, 1, head, d) * p.scale;
      if (p.bias != nullptr) score += p.bias[head * (2 * p.bias_reach - 1) + p.bias_reach - 1 + j - i];
      weight[static_cast<size_t>(j)] = score;
      top = std::max(top, score);
    }
    for (int64_t j = first; j < last; ++j)
      total += weight[static_cast<size_t>(j)] = std::exp(weight[static_cast<size_t>(j)] - top);
    for (int64_t j = first; j < last; ++j) {
      double along = 0;
      for (int64_t d = 0; d < dim; ++d) along += g(d) * c.at(start + j, 2, head, d);
      grad_p[static_cast<size_t>(j)] = dropped(dropout, start + i, head, j, along);
      delta += (weight[static_cast<size_t>(j)] /= total) * grad_p[static_cast<size_t>(j)];
    }
    for (int64_t j = first; j < last; ++j) {
      const double w = weight[static_cast<size_t>(j)], s = w * (grad_p[static_cast<size_t>(j)] - delta);
      const double kept = dropped(dropout, start + i, head, j, w);
      if (p.bias != nullptr) result.bias[static_cast<size_t>(p.bias_reach - 1 + j - i)] += s;
      for (int64_t d = 0; d < dim; ++d) {
        result.q[static_cast<size_t>(i * dim + d)] += s * c.at(start + j, 1, head, d) * p.scale;
        result.k[static_cast<size_t>(j * dim + d)] += s * c.at(start + i, 0, head, d) * p.scale;
        result.v[static_cast<size_t>(j * dim + d)] += kept * g(d);
      }
    }
  }
  return result;
}

template <class E>
void test_attention_backward(int64_t head_dim = 0) {
  AttentionCase<E> c(head_dim);
  for (int64_t i = 0; i < c.qkv.n; ++i) {
    if (std::isnan(widen(c.qkv[i]))) c.qkv[i] = narrow<E>(0.5f);  // its spreading is tested in Python
  }
  const int64_t heads = c.p.heads, dim = c.p.head_dim, hidden = heads * dim, columns = 2 * c.p.bias_reach - 1;
  const Buffer<E> grad = random<E>(c.tokens * hidden), grad_qkv(c.tokens * 3 * hidden);
  const std::vector<int64_t> parts = {0, c.sequences / 2, c.sequences};
  const Buffer<float> grad_bias(c.p.bias != nullptr ? 2 * heads * columns : 0);
  for (int64_t i = 0; i < grad_bias.n; ++i) grad_bias[i] = 0;
  AttentionBackward p = {};
  p.forward = c.p;
  p.forward.dropout = random_dropout();
  p.grad = {grad.get(), hidden};
  p.grad_q = grad_qkv.get();
  p.grad_k = grad_qkv.get() + hidden;
  p.grad_v = grad_qkv.get() + 2 * hidden;
  p.grad_stride = 3 * hidden;
  p.parts = parts.data();
  p.grad_bias = c.p.bias != nullptr ? grad_bias.get() : nullptr;
  in_threads(2 * heads, [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(attention_backward_scratch(c.longest, dim));
    std::memset(scratch.get(), 0xff, static_cast<size_t>(scratch.n));  // NaN
    kernels().attention_backward[compute<E>()](p, begin, end, scratch.get());
  });
  std::vector<double> biases(static_cast<size_t>(std::max<int64_t>(heads * columns, 0)));
  // Sums of up to `longest` products, whose scores have errors of their own; large scales make large scores.
  const double size = 20.0 * static_cast<double>(std::max<int64_t>(c.longest, 1)) * p.forward.dropout.scale;
  for (int64_t i = 0; i < c.sequences; ++i) {
    for (int64_t head = 0; head < heads; ++head) {
      const HeadGradient want = head_gradient(c, p.forward.dropout, grad, i, head);
      const auto compare = [&](const char* what, const std::vector<double>& exact, int64_t part) {
        for (size_t at = 0; at < exact.size(); ++at) {
          const int64_t row = c.cu_seqlens[i] + static_cast<int64_t>(at) / dim;
          const E got = grad_qkv[((row * 3 + part) * heads + head) * dim + static_cast<int64_t>(at) % dim];
          close(what, widen(got), exact[at], tolerance<E>(), dtype<E>() == Dtype::Float32 ? size : 1);
        }
      };
      compare("attention, gradient of q", want.q, 0);
      compare("attention, gradient of k", want.k, 1);
      compare("attention, gradient of v", want.v, 2);
      for (int64_t d = 0; c.p.bias != nullptr && d < columns; ++d) {
        biases[static_cast<size_t>(head * columns + d)] += want.bias[static_cast<size_t>(d)];
      }
    }
  }
  for (int64_t at = 0; c.p.bias != nullptr && at < heads * columns; ++at) {
    const double got = double{grad_bias[at]} + grad_bias[heads * columns + at];
    close("attention, gradient of the bias", got, biases[static_cast<size_t>(at)], 2e-5, 4 * size);
  }
}

}  // namespace check
