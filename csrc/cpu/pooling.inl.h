// Pooling: each sequence is read once, four tokens at a time, into float32 rows that stay in the first cache.
//
// Tokens stream from memory in order whatever the mode, so every mode runs at the speed of the memory; a second mode
// finds the four tokens still in cache. The gradient is one write of its own size.

namespace pooling {

// First i in [from, length) where (mask[i * stride] != 0) == wanted, else length.
template <class M>
int64_t find(const M* mask, int64_t stride, int64_t from, int64_t length, bool wanted) {
  while (from < length && (mask[from * stride] != 0) != wanted) ++from;
  return from;
}

// One sequence: where its rows are and which of them count.
struct Sequence {
  const Layout& layout;
  int64_t index, origin, length;  // rows [origin, origin + length) of a packed batch; origin is 0 if padded
  int64_t left_pad;

  Sequence(const Layout& l, int64_t i) : layout(l), index(i), origin(0), length(l.length), left_pad(0) {
    if (l.cu_seqlens != nullptr) {
      origin = l.cu_seqlens[i];
      length = l.cu_seqlens[i + 1] - origin;
    } else if (l.mask != nullptr) {
      const int64_t first = next(0, true);
      left_pad = first < length ? first : 0;
    }
  }

  int64_t next(int64_t from, bool wanted) const {
    const int64_t stride = layout.mask_stride_token, offset = index * layout.mask_stride_batch;
    switch (layout.mask_bytes) {
      case 1:
        return find(static_cast<const uint8_t*>(layout.mask) + offset, stride, from, length, wanted);
      case 2:
        return find(static_cast<const uint16_t*>(layout.mask) + offset, stride, from, length, wanted);
      case 4:
        return find(static_cast<const uint32_t*>(layout.mask) + offset, stride, from, length, wanted);
      default:
        return find(static_cast<const uint64_t*>(layout.mask) + offset, stride, from, length, wanted);
    }
  }

  // The next run of tokens in use at or after `end`; false if there is none. Start with end = 0.
  bool next_span(int64_t& begin, int64_t& end) const {
    const int64_t earliest = left_pad + layout.prompt_length;
    const int64_t from = end > earliest ? end : earliest;
    if (from >= length) return false;
    begin = layout.mask != nullptr ? next(from, true) : from;
    if (begin >= length) return false;
    end = layout.mask != nullptr ? next(begin, false) : length;
    return true;
  }

  float weight(int64_t token) const { return static_cast<float>(token - left_pad + 1); }
};

// What the means divide by and which tokens `cls` and `lasttoken` take; -1: none, the result is zero.
struct Summary {
  int64_t count = 0, first = -1, last = -1;
  double weights = 0;  // sum of the weights of `weightedmean`: exact up to 2^53

  void add(const Sequence& s, int64_t begin, int64_t end) {
    const double low = static_cast<double>(begin - s.left_pad + 1), high = static_cast<double>(end - s.left_pad);
    weights += (low + high) * static_cast<double>(end - begin) * 0.5;
    count += end - begin;
    if (first < 0) first = begin;
    last = end - 1;
  }
  void finish(const Sequence& s) {
    if (s.length == 0) return;
    if (s.layout.cu_seqlens != nullptr) {
      if (first < 0) first = 0;
      last = s.length - 1;  // the last token counts even where it belongs to the prompt
    } else if (first < 0) {
      first = 0;
    }
  }
  float denominator(int64_t mode) const {
    double total = mode == kWeightedMean ? weights : static_cast<double>(count);
    if (total < 1e-9) total = 1e-9;
    return static_cast<float>(mode == kMeanSqrtLen ? __builtin_sqrt(total) : total);
  }
};

template <class T>
void add_rows(float* sum, const T* x, int64_t stride, int64_t n, int64_t dim) {
  const T *x1 = x + stride, *x2 = x + 2 * stride, *x3 = x + 3 * stride;
  if (n == 4) {
    each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
      const Vec pairs = (load(x + d, k) + load(x1 + d, k)) + (load(x2 + d, k) + load(x3 + d, k));
      (Vec::load(sum + d) + pairs).store(sum + d);
    });
    return;
  }
  for (int64_t i = 0; i < n; ++i, x += stride) {
    each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE { (Vec::load(sum + d) + load(x + d, k)).store(sum + d); });
  }
}

template <class T>
void add_weighted_rows(float* sum, const T* x, int64_t stride, int64_t n, int64_t dim, float weight) {
  const T *x1 = x + stride, *x2 = x + 2 * stride, *x3 = x + 3 * stride;
  const Vec w0 = Vec::fill(weight), w1 = Vec::fill(weight + 1), w2 = Vec::fill(weight + 2), w3 = Vec::fill(weight + 3);
  if (n == 4) {
    each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
      const Vec low = Vec::fma(w0, load(x + d, k), w1 * load(x1 + d, k));
      const Vec high = Vec::fma(w2, load(x2 + d, k), w3 * load(x3 + d, k));
      (Vec::load(sum + d) + (low + high)).store(sum + d);
    });
    return;
  }
  for (int64_t i = 0; i < n; ++i, x += stride) {
    const Vec w = Vec::fill(weight + static_cast<float>(i));
    each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
      Vec::fma(w, load(x + d, k), Vec::load(sum + d)).store(sum + d);
    });
  }
}

template <class T>
void max_rows(float* best, int32_t* argmax, const T* x, int64_t stride, int64_t n, int64_t dim, int64_t token) {
  each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    Vec top = Vec::load(best + d);
    auto where = Vec::load_index(argmax + d, k.count);
    const T* row = x + d;
    for (int64_t i = 0; i < n; ++i, row += stride) {
      const Vec value = load(row, k);
      const auto replaced = Vec::above(value, top);
      top = Vec::select(replaced, value, top);
      where = Vec::select_index(replaced, static_cast<int32_t>(token + i), where);
    }
    top.store(best + d);
    Vec::store_index(where, argmax + d, k.count);
  });
}

template <class T>
void max_rows(float* best, const T* x, int64_t stride, int64_t n, int64_t dim) {
  each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    Vec top = Vec::load(best + d);
    const T* row = x + d;
    for (int64_t i = 0; i < n; ++i, row += stride) {
      const Vec value = load(row, k);
      top = Vec::select(Vec::above(value, top), value, top);
    }
    top.store(best + d);
  });
}

// One mode's result before conversion: a float32 row to divide, or a token's row as it is, or zeros.
template <class T>
struct Part {
  const float* sums = nullptr;
  const T* token = nullptr;
  float denominator = 1.0f;

  template <class K>
  Vec at(int64_t d, K k) const {
    if (sums != nullptr) return Vec::load(sums + d) / Vec::fill(denominator);
    return token != nullptr ? load(token + d, k) : Vec::zero();
  }
};

template <class T>
void pool_one(const Pool& p, int64_t index, float* scratch) {
  const Sequence s(p.layout, index);
  const int64_t dim = p.layout.dim, padded = round_up(dim);
  float *sum = scratch, *weighted = scratch + padded, *best = scratch + 2 * padded;
  int32_t* argmax = p.argmax != nullptr ? p.argmax + index * dim : nullptr;
  bool need_sum = false, need_weighted = false, need_max = false;
  for (int64_t m = 0; m < p.mode_count; ++m) {
    need_sum |= p.modes[m] == kMean || p.modes[m] == kMeanSqrtLen;
    need_weighted |= p.modes[m] == kWeightedMean;
    need_max |= p.modes[m] == kMax;
  }
  if (need_sum) fill(sum, padded, 0.0f);
  if (need_weighted) fill(weighted, padded, 0.0f);
  if (need_max) fill(best, padded, -__builtin_inff());

  const T* x = static_cast<const T*>(p.x) + index * p.stride_batch + s.origin * p.stride_token;
  Summary summary;
  for (int64_t begin = 0, end = 0; s.next_span(begin, end);) {
    // A sentence of -inf alone has its maximum at its first token.
    if (argmax != nullptr && summary.count == 0) fill(argmax, dim, static_cast<int32_t>(begin));
    summary.add(s, begin, end);
    if (!need_sum && !need_weighted && !need_max) continue;
    for (int64_t token = begin; token < end; token += 4) {
      const int64_t n = end - token < 4 ? end - token : 4;
      const T* rows = x + token * p.stride_token;
      if (need_sum) add_rows(sum, rows, p.stride_token, n, dim);
      if (need_weighted) add_weighted_rows(weighted, rows, p.stride_token, n, dim, s.weight(token));
      if (need_max && argmax != nullptr) max_rows(best, argmax, rows, p.stride_token, n, dim, token);
      if (need_max && argmax == nullptr) max_rows(best, rows, p.stride_token, n, dim);
    }
  }
  if (argmax != nullptr && summary.count == 0) fill(argmax, dim, int32_t{-1});
  summary.finish(s);

  Part<T> parts[kMaxModes];
  for (int64_t m = 0; m < p.mode_count; ++m) {
    const int64_t mode = p.modes[m];
    const int64_t token = mode == kCls ? summary.first : mode == kLastToken ? summary.last : -1;
    if (token >= 0) {
      parts[m].token = x + token * p.stride_token;
    } else if (mode != kCls && mode != kLastToken) {
      parts[m].sums = mode == kMax ? best : mode == kWeightedMean ? weighted : sum;
      if (mode != kMax) parts[m].denominator = summary.denominator(mode);
    }
  }

  float divisor = 1.0f;
  if (p.normalize) {
    Vec squares = Vec::zero();
    for (int64_t m = 0; m < p.mode_count; ++m) {
      each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
        const Vec value = only(parts[m].at(d, k), k);
        squares = Vec::fma(value, value, squares);
      });
    }
    const float norm = __builtin_sqrtf(squares.sum());
    if (p.norm != nullptr) p.norm[index] = norm;
    divisor = at_least(norm, kNormalizeEps);
  }
  T* out = static_cast<T*>(p.out) + index * p.mode_count * dim;
  for (int64_t m = 0; m < p.mode_count; ++m, out += dim) {
    each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
      const Vec value = parts[m].at(d, k);
      store(p.normalize ? value / Vec::fill(divisor) : value, out + d, k);
    });
  }
}

template <class T>
void pool(const Pool& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = begin; i < end; ++i) pool_one<T>(p, i, scratch);
}

// grad_pooled: the gradient of the rows before normalisation, float32 [mode_count, round_up(dim)].
template <class T>
void unnormalized_gradient(const PoolBackward& p, int64_t index, float* grad_pooled) {
  const int64_t dim = p.layout.dim, padded = round_up(dim), width = p.mode_count * dim;
  const T* grad = static_cast<const T*>(p.grad) + index * width;
  const T* out = static_cast<const T*>(p.out) + index * width;
  float along = 0.0f, divisor = 1.0f;
  if (p.normalize) {
    Vec sum = Vec::zero();
    each_vector(width, [&](int64_t d, auto k) SENTFAST_INLINE { sum = Vec::fma(load(grad + d, k), load(out + d, k), sum); });
    // Below eps the denominator is a constant.
    along = p.norm[index] < kNormalizeEps ? 0.0f : sum.sum();
    divisor = at_least(p.norm[index], kNormalizeEps);
  }
  for (int64_t m = 0; m < p.mode_count; ++m) {
    each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
      Vec value = load(grad + m * dim + d, k);
      if (p.normalize) {
        const Vec tangent = along == 0.0f ? value : value - load(out + m * dim + d, k) * Vec::fill(along);
        value = tangent / Vec::fill(divisor);
      }
      value.store(grad_pooled + m * padded + d);
    });
  }
}

// A token's gradient: constant + weight * weighted, plus best where this token was the largest.
template <class T>
struct TokenGradient {
  const float *constant = nullptr, *weighted = nullptr, *best = nullptr;
  const int32_t* argmax = nullptr;
  bool stream = false;

  void write(T* row, int64_t dim, float weight, int64_t token) const {
    each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
      Vec value = constant != nullptr ? Vec::load(constant + d) : Vec::zero();
      if (weighted != nullptr) value = Vec::fma(Vec::fill(weight), Vec::load(weighted + d), value);
      if (best != nullptr) {
        const auto here = Vec::equal(Vec::load_index(argmax + d, k.count), static_cast<int32_t>(token));
        value = Vec::select(here, value + Vec::load(best + d), value);
      }
      stream ? store_stream(value, row + d, k) : store(value, row + d, k);
    });
  }
};

template <class T>
void write_zeros(T* rows, int64_t n, bool stream) {
  each_vector(n, [&](int64_t d, auto k) SENTFAST_INLINE {
    stream ? store_stream(Vec::zero(), rows + d, k) : store(Vec::zero(), rows + d, k);
  });
}

template <class T>
void pool_backward_one(const PoolBackward& p, int64_t index, float* scratch) {
  const Sequence s(p.layout, index);
  const int64_t dim = p.layout.dim, padded = round_up(dim);
  float *constant = scratch, *weighted = scratch + padded, *best = scratch + 2 * padded;
  float* grad_pooled = scratch + 3 * padded;
  unnormalized_gradient<T>(p, index, grad_pooled);

  Summary summary;
  for (int64_t begin = 0, end = 0; s.next_span(begin, end);) summary.add(s, begin, end);
  summary.finish(s);

  TokenGradient<T> token_gradient;
  token_gradient.stream = p.stream;
  const auto accumulate = [&](const float** slot, float* row, const float* part, float denominator) {
    if (*slot == nullptr) fill(row, padded, 0.0f);
    *slot = row;
    each_vector(dim, [&](int64_t d, auto) SENTFAST_INLINE {
      (Vec::load(row + d) + Vec::load(part + d) / Vec::fill(denominator)).store(row + d);
    });
  };
  bool single = false;  // `cls` or `lasttoken` add to one row afterwards
  for (int64_t m = 0; m < p.mode_count; ++m) {
    const int64_t mode = p.modes[m];
    const float* part = grad_pooled + m * padded;
    if (mode == kCls || mode == kLastToken) {
      single = true;
    } else if (mode == kMax) {
      accumulate(&token_gradient.best, best, part, 1.0f);
      token_gradient.argmax = p.argmax + index * dim;
    } else if (mode == kWeightedMean) {
      accumulate(&token_gradient.weighted, weighted, part, summary.denominator(mode));
    } else {
      accumulate(&token_gradient.constant, constant, part, summary.denominator(mode));
    }
  }

  T* grad_x = static_cast<T*>(p.grad_x) + (p.layout.cu_seqlens != nullptr ? s.origin : index * s.length) * dim;
  const bool every_token = token_gradient.constant != nullptr || token_gradient.weighted != nullptr ||
                           token_gradient.best != nullptr;
  int64_t written = 0;
  for (int64_t begin = 0, end = 0; every_token && s.next_span(begin, end); written = end) {
    write_zeros(grad_x + written * dim, (begin - written) * dim, p.stream);
    for (int64_t token = begin; token < end; ++token) {
      token_gradient.write(grad_x + token * dim, dim, s.weight(token), token);
    }
  }
  write_zeros(grad_x + written * dim, (s.length - written) * dim, p.stream);

  for (int64_t m = 0; single && m < p.mode_count; ++m) {
    const int64_t token = p.modes[m] == kCls ? summary.first : p.modes[m] == kLastToken ? summary.last : -1;
    if (token < 0) continue;
    T* row = grad_x + token * dim;
    each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
      store(load(row + d, k) + Vec::load(grad_pooled + m * padded + d), row + d, k);
    });
  }
  if (p.stream) Vec::stream_fence();
}

template <class T>
void pool_backward(const PoolBackward& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = begin; i < end; ++i) pool_backward_one<T>(p, i, scratch);
}

}  // namespace pooling
