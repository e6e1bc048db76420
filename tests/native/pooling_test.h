// Pooling against a plain double implementation, token by token.
#pragma once

#include "check.h"

namespace check {

struct PoolCase {
  Layout layout = {};
  Buffer<uint8_t> mask{0};  // whether there is a token
  Buffer<char> words{0};    // the same as the kernel gets it: numbers of 1 to 8 bytes, one of which is set
  Buffer<int32_t> cu_seqlens{0};
  std::vector<int64_t> modes;
  int64_t tokens = 0;  // rows of x

  PoolCase() {
    const bool packed = integer(0, 1) != 0;
    // Many sentences, as rows are asked for ahead; or long ones, whose mask has whole lines.
    const bool many = integer(0, 3) == 0, lengthy = !many && integer(0, 3) == 0;
    const int64_t batch = integer(1, many ? 40 : 5);
    layout.dim = integer(1, 70);
    layout.length = lengthy ? integer(60, 200) : integer(0, 12);
    const int64_t tokens_of_ten = lengthy ? integer(0, 10) : 7;
    layout.prompt_length = integer(0, 3);
    if (packed) {
      cu_seqlens = Buffer<int32_t>(batch + 1);
      cu_seqlens[0] = 0;
      for (int64_t i = 0; i < batch; ++i) cu_seqlens[i + 1] = cu_seqlens[i] + static_cast<int32_t>(integer(0, 9));
      layout.length = tokens = cu_seqlens[batch];
      layout.cu_seqlens = cu_seqlens.get();
    } else {
      tokens = batch * layout.length;
      mask = Buffer<uint8_t>(tokens);
      for (int64_t i = 0; i < tokens; ++i) mask[i] = integer(1, 10) <= tokens_of_ten;
      const int64_t bytes = int64_t{1} << integer(0, 3), stride = integer(0, 3) == 0 ? 2 : 1;
      words = Buffer<char>(tokens * stride * bytes);
      for (int64_t i = 0; i < words.n; ++i) words[i] = 0;
      for (int64_t i = 0; i < tokens; ++i) words[i * stride * bytes + integer(0, bytes - 1)] = mask[i] != 0;
      layout.mask = words.get();
      layout.mask_bytes = bytes;
      layout.mask_stride_batch = layout.length * stride;
      layout.mask_stride_token = stride;
    }
    layout.batch = batch;
    if (layout.prompt_length > layout.length) layout.prompt_length = layout.length;
    for (int64_t n = integer(1, 4); n > 0; --n) modes.push_back(integer(kMean, kMeanSqrtLen));
  }

  bool packed() const { return layout.cu_seqlens != nullptr; }
  int64_t start(int64_t i) const { return packed() ? cu_seqlens[i] : i * layout.length; }
  int64_t length(int64_t i) const { return packed() ? cu_seqlens[i + 1] - cu_seqlens[i] : layout.length; }

  // Weight of each token of sequence i in a mode; the modes without weights give none.
  std::vector<double> weights(int64_t i, int64_t mode) const {
    const int64_t n = length(i);
    std::vector<double> w(n, 0.0);
    int64_t pad = 0;
    while (!packed() && pad < n && mask[start(i) + pad] == 0) ++pad;
    if (pad == n) pad = 0;
    int64_t first = -1, last = -1;
    double total = 0;
    for (int64_t t = 0; t < n; ++t) {
      if (t < pad + layout.prompt_length || (!packed() && mask[start(i) + t] == 0)) continue;
      w[t] = mode == kWeightedMean ? static_cast<double>(t - pad + 1) : 1.0;
      total += w[t];
      if (first < 0) first = t;
      last = t;
    }
    if (mode == kMax) return w;
    if (mode == kCls || mode == kLastToken) {
      const int64_t token = mode == kCls ? (first < 0 ? 0 : first) : (packed() ? n - 1 : last);
      std::fill(w.begin(), w.end(), 0.0);
      if (token >= 0 && n > 0) w[token] = 1.0;
      return w;
    }
    for (double& x : w) x /= total == 0 ? 1 : mode == kMeanSqrtLen ? std::sqrt(total) : total;
    return w;
  }

  bool used(int64_t token, int64_t i) const {
    for (const int64_t mode : modes) {
      if (weights(i, mode)[token] != 0) return true;
    }
    return false;
  }
};

template <class T>
void test_pooling(bool normalize) {
  PoolCase c;
  const int64_t dim = c.layout.dim, batch = c.layout.batch, count = static_cast<int64_t>(c.modes.size());
  const Buffer<T> x = random<T>(c.tokens * dim);
  for (int64_t i = 0; i < batch; ++i) {
    for (int64_t t = 0; t < c.length(i); ++t) {
      if (c.used(t, i)) continue;  // a token that no mode reads may hold anything
      for (int64_t d = 0; d < dim; ++d) x[(c.start(i) + t) * dim + d] = narrow<T>(NAN);
    }
  }
  const Buffer<T> out(batch * count * dim);
  const Buffer<float> norm(batch);
  const Buffer<int32_t> argmax(batch * dim);
  Pool p = {};
  p.layout = c.layout;
  p.mode_count = count;
  for (int64_t m = 0; m < count; ++m) p.modes[m] = c.modes[m];
  p.normalize = normalize;
  p.x = x.get();
  p.stride_batch = c.packed() ? 0 : c.layout.length * dim;
  p.stride_token = dim;
  p.out = out.get();
  p.norm = norm.get();
  p.argmax = argmax.get();
  const int index = static_cast<int>(dtype<T>());
  in_threads(batch, [&](int64_t begin, int64_t end) {
    const Buffer<float> scratch(pool_scratch(dim));
    kernels().pool[index](p, begin, end, scratch.get());
  });

  const Buffer<T> grad = random<T>(batch * count * dim), grad_x(c.tokens * dim);
  PoolBackward q = {};
  q.layout = c.layout;
  q.mode_count = count;
  for (int64_t m = 0; m < count; ++m) q.modes[m] = c.modes[m];
  q.grad = grad.get();
  q.out = out.get();
  q.argmax = argmax.get();
  q.grad_x = grad_x.get();
  in_threads(batch, [&](int64_t begin, int64_t end) {
    const Buffer<float> scratch(pool_backward_scratch(dim, count));
    kernels().pool_backward[index](q, begin, end, scratch.get());
  });

  for (int64_t i = 0; i < batch; ++i) {
    std::vector<double> row;
    std::vector<double> gradient(c.length(i) * dim, 0.0);
    for (int64_t m = 0; m < count; ++m) {
      const std::vector<double> w = c.weights(i, c.modes[m]);
      for (int64_t d = 0; d < dim; ++d) {
        double value = c.modes[m] == kMax ? -INFINITY : 0.0;
        int64_t best = -1;
        const double g = widen(grad[(i * count + m) * dim + d]);
        for (int64_t t = 0; t < c.length(i); ++t) {
          if (w[t] == 0) continue;
          const double token = widen(x[(c.start(i) + t) * dim + d]);
          if (c.modes[m] != kMax) {
            value += w[t] * token;
            gradient[t * dim + d] += w[t] * g;
          } else if (token > value) {
            value = token;
            best = t;
          }
        }
        if (best >= 0) gradient[best * dim + d] += g;
        row.push_back(value);
      }
    }
    double squares = 0;
    for (const double value : row) squares += value * value;
    const double divisor = normalize ? std::fmax(std::sqrt(squares), 1e-12) : 1.0;
    for (int64_t d = 0; d < count * dim; ++d) {
      close("pool", widen(out[i * count * dim + d]), row[d] / divisor, tolerance<T>());
    }
    if (normalize) continue;  // the gradient of the normalisation is tested on its own
    for (int64_t d = 0; d < c.length(i) * dim; ++d) {
      close("pool_backward", widen(grad_x[c.start(i) * dim + d]), gradient[d], tolerance<T>(), 4.0);
    }
  }
}

}  // namespace check
