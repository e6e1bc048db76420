// Linear layers and attention of the encoder against plain double loops. A bound counts roundings: kRound of each
// operation's magnitude in float32, and kRoundBFloat16 where a result is rounded to bf16.
#pragma once

#include <algorithm>
#include <cstring>

#include "check.h"

namespace check {

constexpr double kRound = 1.0 / (1 << 24), kRoundBFloat16 = 1.0 / (1 << 8);
// What the elementary functions may be off by, relative to the argument: a few roundings, a quarter of bf16's last.
constexpr double kExactFunction = 8 * kRound, kBFloat16Function = kRoundBFloat16 / 2;

inline void within(const char* what, double got, double want, double bound) {
  const bool finite = std::isfinite(want) && std::fabs(got - want) <= bound + 1e-30;
  if (finite || got == want || (std::isnan(got) && std::isnan(want))) {
    ++counts().passed;
  } else if (++counts().failed <= 20) {
    std::printf("FAILED %s on %s: got %.9g, expected %.9g within %.3g\n", what, isa_name(isa()), got, want, bound);
  }
}

template <class E>
constexpr int compute() {
  return static_cast<int>(dtype<E>() == Dtype::BFloat16 ? Compute::BFloat16 : Compute::Float32);
}
// Rounding of a result that is stored as T.
template <class T>
constexpr double stored() {
  return dtype<T>() == Dtype::Float32 ? kRound : dtype<T>() == Dtype::BFloat16 ? kRoundBFloat16 : 1.0 / (1 << 11);
}
template <class E>
constexpr double function_error() {
  return dtype<E>() == Dtype::Float32 ? kExactFunction : kBFloat16Function;
}

inline Activation any_activation() { return static_cast<Activation>(integer(kGelu, kIdentity)); }

inline double activate(Activation activation, double x) {
  switch (activation) {
    case kGelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case kGeluTanh:
      return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case kRelu:
      return x < 0 ? 0 : x;
    case kSilu:
      return x / (1 + std::exp(-x));
    default:
      return x;
  }
}

template <class T>
void fill_with(const Buffer<T>& buffer, float value) {
  for (int64_t i = 0; i < buffer.n; ++i) buffer[i] = narrow<T>(value);
}
// What no kernel may touch holds this.
constexpr float kGuard = 0.8125f;
template <class T>
void untouched(const char* what, T value) {
  within(what, widen(value), kGuard, 0);
}

// Multiples of 1/8 up to 2 have exact products and sums.
template <class T>
Buffer<T> eighths(int64_t n) {
  Buffer<T> buffer(n);
  for (int64_t i = 0; i < n; ++i) buffer[i] = narrow<T>(static_cast<float>(integer(-16, 16)) / 8);
  return buffer;
}

// ---- linear ----

// [columns, depth] in panels. What fills the last panel must not reach y; what fills the last pair is zero.
template <class E>
Buffer<E> pack(const Buffer<E>& weight, int64_t columns, int64_t depth) {
  const int64_t pair = dtype<E>() == Dtype::BFloat16 ? 2 : 1, steps = (depth + pair - 1) / pair;
  const int64_t panels = (columns + kPanel - 1) / kPanel;
  Buffer<E> packed(panels * kPanel * steps * pair);
  for (int64_t i = 0; i < packed.n; ++i) {
    const int64_t half = i % pair, lane = i / pair % kPanel, step = i / pair / kPanel % steps;
    const int64_t column = i / pair / kPanel / steps * kPanel + lane, k = step * pair + half;
    packed[i] = column >= columns ? narrow<E>(NAN) : k >= depth ? narrow<E>(0) : weight[column * depth + k];
  }
  return packed;
}

template <class E, class Out>
LinearFn linear_kernel() {
  const bool same = dtype<E>() == dtype<Out>() && integer(0, 1) == 0;
  return dtype<Out>() == Dtype::BFloat16 || same ? kernels().linear[compute<E>()]
                                                 : kernels().linear_float32[compute<E>()];
}

// Blocks of rows and panels, each with scratch of its own.
inline void run_linear(LinearFn kernel, const Linear& p, int64_t rows) {
  const int64_t middle = integer(0, rows), panels = (p.columns + kPanel - 1) / kPanel;
  in_threads(panels, [&](int64_t begin, int64_t end) {
    for (const auto& span : {std::make_pair(int64_t{0}, middle), std::make_pair(middle, rows)}) {
      const Buffer<float> scratch(linear_scratch(span.second - span.first, p.depth));
      kernel(p, {span.first, span.second, begin, end, scratch.get()});
    }
  });
}

template <class E, class Out>
void test_linear() {
  constexpr bool pairs = dtype<E>() == Dtype::BFloat16;
  const bool deep = integer(0, 3) == 0, exact = integer(0, 1) == 0, with_bias = integer(0, 2) != 0;
  const int64_t rows = integer(1, deep ? 9 : 50), columns = integer(1, deep ? 130 : 200);
  const int64_t depth = deep ? integer(250, 1100) * integer(1, 2) : integer(2, 100);
  const int64_t even = pairs ? (depth + 1) / 2 * 2 : depth;
  const int64_t stride_x = even + 2 * integer(0, 1), stride_y = columns + integer(0, 3);
  const Buffer<E> x = exact ? eighths<E>((rows - 1) * stride_x + even) : random<E>((rows - 1) * stride_x + even);
  const Buffer<E> weight = exact ? eighths<E>(columns * depth) : random<E>(columns * depth);
  // In panels, or as it is with rows apart.
  const int64_t stride_weight = pairs ? 0 : integer(0, 1) * (depth + integer(0, 2));
  Buffer<E> laid_out = pack(weight, columns, depth);
  if (stride_weight > 0) {
    laid_out = Buffer<E>((columns - 1) * stride_weight + depth);
    for (int64_t i = 0; i < laid_out.n; ++i) {
      const int64_t k = i % stride_weight;
      laid_out[i] = k < depth ? weight[i / stride_weight * depth + k] : narrow<E>(NAN);
    }
  }
  const Buffer<float> bias = exact ? eighths<float>(columns) : random<float>(columns);
  const Buffer<Out> y((rows - 1) * stride_y + columns);
  fill_with(y, kGuard);
  const Activation activation = any_activation();
  run_linear(linear_kernel<E, Out>(),
             {columns, depth, x.get(), stride_x, laid_out.get(), stride_weight, with_bias ? bias.get() : nullptr,
              activation, y.get(), stride_y},
             rows);
  if (stride_weight > 0) {  // where the weight lies must not change a bit
    const Buffer<E> panels = pack(weight, columns, depth);
    const Buffer<Out> other(rows * columns);
    run_linear(linear_kernel<E, Out>(),
               {columns, depth, x.get(), stride_x, panels.get(), 0, with_bias ? bias.get() : nullptr, activation,
                other.get(), columns},
               rows);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        within("linear, in place and from panels", widen(y[i * stride_y + j]), widen(other[i * columns + j]), 0);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = with_bias ? bias[j] : 0, size = std::fabs(sum);
      for (int64_t k = 0; k < depth; ++k) {
        const double product = widen(x[i * stride_x + k]) * widen(weight[j * depth + k]);
        sum += product;
        size += std::fabs(product);
      }
      const double want = activate(activation, sum);
      double bound = exact ? 0 : 1.2 * static_cast<double>(depth + 2) * kRound * size;  // a slope is at most 1.13
      if (activation != kIdentity && activation != kRelu) bound += function_error<E>() * std::fabs(sum);
      if (dtype<Out>() == Dtype::BFloat16 || !exact) bound += stored<Out>() * (std::fabs(want) + bound);
      within("linear", widen(y[i * stride_y + j]), want, bound);
    }
    for (int64_t j = columns; i + 1 < rows && j < stride_y; ++j) untouched("linear, gap", y[i * stride_y + j]);
  }
}

// Each value goes through an activation as the sum of a row with one term.
template <class E, class Out>
void test_activations() {
  std::vector<float> values = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-30f, -1e-30f, 3e38f, -3e38f};
  for (int i = 0; i < 60; ++i) values.push_back(static_cast<float>(integer(-600, 600)) / 10 + normal() / 20);
  for (int i = 0; i < 60; ++i) values.push_back(normal() * 3);
  const int64_t rows = static_cast<int64_t>(values.size()), columns = integer(1, 20), depth = 2;
  const Buffer<E> x(rows * depth), weight(columns * depth);
  fill_with(x, 0);
  fill_with(weight, 0);
  for (int64_t i = 0; i < rows; ++i) x[i * depth] = narrow<E>(values[static_cast<size_t>(i)]);
  for (int64_t j = 0; j < columns; ++j) weight[j * depth] = narrow<E>(1);
  const Buffer<E> panels = pack(weight, columns, depth);
  const Buffer<Out> y(rows * columns);
  for (const Activation activation : {kGelu, kGeluTanh, kRelu, kSilu, kIdentity}) {
    run_linear(linear_kernel<E, Out>(),
               {columns, depth, x.get(), depth, panels.get(), 0, nullptr, activation, y.get(), columns}, rows);
    for (int64_t i = 0; i < rows * columns; ++i) {
      const double from = widen(x[i / columns * depth]), want = activate(activation, from);
      double bound = stored<Out>() * std::fabs(want);
      if (std::isfinite(from)) bound += function_error<E>() * std::fabs(from);
      within("activation", widen(y[i]), want, bound);
    }
  }
}

// ---- attention ----

template <class E>
struct AttentionCase {
  Attention p = {};
  Buffer<int32_t> cu_seqlens{0};
  Buffer<E> qkv{0}, out{0};
  Buffer<float> bias{0}, lse{0};
  int64_t stride, sequences, tokens = 0, longest = 0;

  // A head size that is given goes with a few short sequences, so that all sizes are tried in little time.
  explicit AttentionCase(int64_t head_dim = 0) {
    constexpr int64_t lengths[] = {0, 1, 2, 15, 16, 17, 18, 63, 64, 65, 66, 130};
    constexpr int64_t windows[] = {-1, -1, 0, 1, 5, 64};
    constexpr int64_t pair = sizeof(float) / sizeof(E);
    const bool given = head_dim > 0;
    p.head_dim = given ? head_dim : pair * integer(1, 128 / pair);
    p.heads = given ? integer(1, 2) : integer(1, std::max<int64_t>(1, 64 / p.head_dim));
    p.left = windows[integer(0, 5)];
    p.right = integer(0, 1) == 0 ? p.left : windows[integer(0, 5)];
    p.first_row_only = integer(0, 3) == 0;
    p.scale = (integer(0, 3) == 0 ? 8.0f : 1.0f) / std::sqrt(static_cast<float>(p.head_dim));
    sequences = given ? integer(1, 2) : integer(1, 4);
    cu_seqlens = Buffer<int32_t>(sequences + 1);
    cu_seqlens[0] = 0;
    for (int64_t i = 0; i < sequences; ++i) {
      const int64_t length = given ? integer(1, 40) : lengths[integer(0, 11)];
      longest = std::max(longest, length);
      cu_seqlens[i + 1] = static_cast<int32_t>(tokens += length);
    }
    const int64_t hidden = p.heads * p.head_dim;
    stride = 3 * hidden + 2 * integer(0, 1);
    qkv = random<E>(tokens > 0 ? (tokens - 1) * stride + 3 * hidden : 0);
    // A query or key that is NaN makes NaN of the rows that see it.
    if (tokens > 0 && integer(0, 3) == 0) {
      qkv[integer(0, tokens - 1) * stride + integer(0, 2 * hidden - 1)] = narrow<E>(NAN);
    }
    if (integer(0, 1) == 0) {
      p.bias_reach = std::max<int64_t>(longest, 1);
      bias = random<float>(p.heads * (2 * p.bias_reach - 1));
      p.bias = bias.get();
    }
    out = Buffer<E>((p.first_row_only ? sequences : tokens) * hidden);
    fill_with(out, kGuard);
    p.cu_seqlens = cu_seqlens.get();
    p.q = {qkv.get(), stride};
    p.k = {qkv.get() + hidden, stride};
    p.v = {qkv.get() + 2 * hidden, stride};
    p.out = out.get();
    if (integer(0, 1) == 0) {
      lse = Buffer<float>(p.heads * tokens);
      p.lse = lse.get();
      p.lse_stride = tokens;
    }
  }

  // part: query, key or value.
  double at(int64_t token, int64_t part, int64_t head, int64_t d) const {
    return widen(qkv[token * stride + (part * p.heads + head) * p.head_dim + d]);
  }
  E* out_row(int64_t sequence, int64_t query) const {
    const int64_t row = p.first_row_only ? sequence : cu_seqlens[sequence] + query;
    return out.get() + row * p.heads * p.head_dim;
  }
};

template <class E>
void check_attention_row(const AttentionCase<E>& c, int64_t sequence, int64_t head, int64_t query) {
  const Attention& p = c.p;
  const int64_t start = c.cu_seqlens[sequence], length = c.cu_seqlens[sequence + 1] - start;
  const int64_t first = p.left < 0 ? 0 : std::max<int64_t>(0, query - p.left);
  const int64_t last = p.right < 0 ? length : std::min(length, query + p.right + 1);
  std::vector<double> weights(static_cast<size_t>(last - first));
  double top = -INFINITY, largest = 0, score_error = 0, total = 0;
  for (int64_t key = first; key < last; ++key) {
    double sum = 0, size = 0;
    for (int64_t d = 0; d < p.head_dim; ++d) {
      const double product = c.at(start + query, 0, head, d) * c.at(start + key, 1, head, d) * p.scale;
      sum += product;
      size += std::fabs(product);
    }
    if (p.bias != nullptr) sum += p.bias[head * (2 * p.bias_reach - 1) + p.bias_reach - 1 + key - query];
    weights[static_cast<size_t>(key - first)] = sum;
    score_error = std::max(score_error, static_cast<double>(p.head_dim + 2) * kRound * size);
    largest = std::max(largest, std::fabs(sum));
    top = std::max(top, sum);
  }
  for (double& x : weights) total += x = std::exp(x - top);
  // A relative error of a weight is the absolute one of its score, and the weights' sum has it once more.
  double relative = 2 * (score_error + 6 * kRound * largest) + static_cast<double>(2 * (last - first) + 16) * kRound;
  if (dtype<E>() == Dtype::BFloat16) relative += kRoundBFloat16 + 2 * kBFloat16Function;
  if (p.lse != nullptr) {
    within("log-sum-exp", p.lse[head * p.lse_stride + start + query], top + std::log(total),
           2 * score_error + 16 * kRound * (largest + 1) + relative);
  }
  const E* out = c.out_row(sequence, query) + head * p.head_dim;
  for (int64_t d = 0; d < p.head_dim; ++d) {
    double want = 0, size = 0;
    for (int64_t key = first; key < last; ++key) {
      const double part = weights[static_cast<size_t>(key - first)] / total * c.at(start + key, 2, head, d);
      want += part;
      size += std::fabs(part);
    }
    within("attention", widen(out[d]), want, relative * size + 2 * stored<E>() * std::fabs(want));
  }
}

template <class E>
void test_attention(int64_t head_dim = 0) {
  const AttentionCase<E> c(head_dim);
  in_threads(c.sequences * c.p.heads, [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(attention_scratch(c.longest, c.p.head_dim));
    std::memset(scratch.get(), 0xff, static_cast<size_t>(scratch.n));  // NaN
    kernels().attention[compute<E>()](c.p, begin, end, scratch.get());
  });
  for (int64_t i = 0; i < c.sequences; ++i) {
    const int64_t length = c.cu_seqlens[i + 1] - c.cu_seqlens[i], hidden = c.p.heads * c.p.head_dim;
    if (length == 0 && c.p.first_row_only) {
      for (int64_t d = 0; d < hidden; ++d) untouched("attention, empty", c.out_row(i, 0)[d]);
    }
    for (int64_t query = 0; query < (c.p.first_row_only ? std::min<int64_t>(length, 1) : length); ++query) {
      for (int64_t head = 0; head < c.p.heads; ++head) check_attention_row(c, i, head, query);
    }
  }
}

}  // namespace check
