// Pooling: each sequence is read once, four tokens at a time, into float32 rows that stay in the first cache.
//
// Tokens come from memory in the same order whatever the mode, so every mode runs at the speed of the memory; a second
// mode finds the four tokens still in cache. The gradient is one write of its own size.

namespace pooling {

// Whether a line of the mask has a place where (mask[i] != 0) == wanted.
template <class M>
bool line_has(const M* mask, bool wanted) {
  M found = 0;  // as wide as the mask, so that the loop is a few vector instructions
  for (size_t i = 0; i < 64 / sizeof(M); ++i) found |= static_cast<M>((mask[i] != 0) == wanted);
  return found != 0;
}

// First i in [from, length) where (mask[i * stride] != 0) == wanted, else length.
template <class M>
int64_t find(const M* mask, int64_t stride, int64_t from, int64_t length, bool wanted) {
  constexpr int64_t line = 64 / sizeof(M);
  if (from < length && (mask[from * stride] != 0) == wanted) return from;  // mostly, and then nothing else is read
  while (stride == 1 && from + line <= length && !line_has(mask + from, wanted)) from += line;
  while (from < length && (mask[from * stride] != 0) != wanted) ++from;
  return from;
}

// Last i below length where mask[i * stride] != 0, else -1.
template <class M>
int64_t find_last(const M* mask, int64_t stride, int64_t length) {
  constexpr int64_t line = 64 / sizeof(M);
  while (stride == 1 && length >= line && !line_has(mask + length - line, true)) length -= line;
  do --length;
  while (length >= 0 && mask[length * stride] == 0);
  return length;
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

  // Calls f with the mask of this sequence in its own type.
  template <class F>
  int64_t with_mask(F f) const {
    const int64_t offset = index * layout.mask_stride_batch;
    switch (layout.mask_bytes) {
      case 1:
        return f(static_cast<const uint8_t*>(layout.mask) + offset);
      case 2:
        return f(static_cast<const uint16_t*>(layout.mask) + offset);
      case 4:
        return f(static_cast<const uint32_t*>(layout.mask) + offset);
      default:
        return f(static_cast<const uint64_t*>(layout.mask) + offset);
    }
  }
  int64_t next(int64_t from, bool wanted) const {
    return with_mask([&](const auto* mask) { return find(mask, layout.mask_stride_token, from, length, wanted); });
  }
  // The last token that the mask leaves in use; -1: none.
  int64_t last() const {
    if (layout.mask == nullptr) return length - 1;
    return with_mask([&](const auto* mask) { return find_last(mask, layout.mask_stride_token, length); });
  }

  // The first token in use at or after `from`; length or more: there is none.
  int64_t first(int64_t from) const {
    const int64_t earliest = left_pad + layout.prompt_length;
    if (from < earliest) from = earliest;
    return layout.mask != nullptr && from < length ? next(from, true) : from;
  }
  // The next run of tokens in use at or after `end`; false if there is none. Start with end = 0.
  bool next_span(int64_t& begin, int64_t& end) const {
    begin = first(end);
    if (begin >= length) return false;
    end = layout.mask != nullptr ? next(begin, false) : length;
    return true;
  }

  float weight(int64_t token) const { return static_cast<float>(token - left_pad + 1); }
};

// Whether a mode takes one token as it is.
inline bool picks(int64_t mode) { return mode == kCls || mode == kLastToken; }

// The token that such a mode takes; -1: none, the result is zero. Reads no more of the mask than it must.
inline int64_t picked(const Sequence& s, int64_t mode) {
  if (s.length == 0) return -1;
  const bool packed = s.layout.cu_seqlens != nullptr;
  if (mode == kCls) {
    const int64_t first = s.first(0);
    return first < s.length ? first : 0;
  }
  if (packed) return s.length - 1;  // the last token counts even where it belongs to the prompt
  const int64_t last = s.last();
  return last >= s.left_pad + s.layout.prompt_length ? last : -1;
}

// What the means divide by.
struct Summary {
  int64_t count = 0;
  double weights = 0;  // sum of the weights of `weightedmean`: exact up to 2^53

  void add(const Sequence& s, int64_t begin, int64_t end) {
    const double low = static_cast<double>(begin - s.left_pad + 1), high = static_cast<double>(end - s.left_pad);
    weights += (low + high) * static_cast<double>(end - begin) * 0.5;
    count += end - begin;
  }
  float denominator(int64_t mode) const {
    double total = mode == kWeightedMean ? weights : static_cast<double>(count);
    if (total < 1e-9) total = 1e-9;
    return static_cast<float>(mode == kMeanSqrtLen ? __builtin_sqrt(total) : total);
  }
};

inline Summary summarize(const Sequence& s) {
  Summary summary;
  for (int64_t begin = 0, end = 0; s.next_span(begin, end);) summary.add(s, begin, end);
  return summary;
}

// N rows at a time. The rows of a group lie far apart, see `pool_span`.
template <int N, class T>
void add_rows(float* sum, const T* const (&x)[N], int64_t dim) {
  each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    Vec value = load(x[0] + d, k);
    for (int q = 1; q < N; ++q) value = value + load(x[q] + d, k);
    (Vec::load(sum + d) + value).store(sum + d);
  });
}

template <int N, class T>
void add_weighted_rows(float* sum, const T* const (&x)[N], const float (&weight)[N], int64_t dim) {
  each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    Vec value = Vec::fill(weight[0]) * load(x[0] + d, k);
    for (int q = 1; q < N; ++q) value = Vec::fma(Vec::fill(weight[q]), load(x[q] + d, k), value);
    (Vec::load(sum + d) + value).store(sum + d);
  });
}

template <int N, class T>
void max_rows(float* best, const T* const (&x)[N], int64_t dim) {
  each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    const Vec old = Vec::load(best + d);
    Vec value[N], top = old;
    for (int q = 0; q < N; ++q) {
      value[q] = load(x[q] + d, k);
      top = Vec::max(value[q], top);
    }
    // The maximum instruction gives its second operand where either is NaN: one in `best` stays, one in a row is lost.
    // A comparison finds it in two rows at once.
    auto nan = Vec::unordered(value[0], value[N - 1]);
    for (int q = 1; q + 1 < N; q += 2) nan = Vec::either(nan, Vec::unordered(value[q], value[q + 1]));
    if (Vec::any(nan)) {
      top = old;
      for (int q = 0; q < N; ++q) top = Vec::select(Vec::above(value[q], top), value[q], top);
    }
    top.store(best + d);
  });
}

template <class T>
void argmax_row(float* best, int32_t* argmax, const T* x, int64_t dim, int64_t token) {
  each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    const Vec top = Vec::load(best + d), value = load(x + d, k);
    const auto replaced = Vec::above(value, top);
    Vec::select(replaced, value, top).store(best + d);
    const auto where = Vec::load_index(argmax + d, k.count);
    Vec::store_index(Vec::select_index(replaced, static_cast<int32_t>(token), where), argmax + d, k.count);
  });
}

// Takes the maxima of later tokens into those of earlier ones.
inline void merge_argmax(float* best, int32_t* argmax, const float* later, const int32_t* later_argmax, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) {
    if (!(later[d] <= best[d]) && best[d] == best[d]) {
      best[d] = later[d];
      argmax[d] = later_argmax[d];
    }
  }
}

// Rows of scratch of one thread: an accumulator per kind of mode, and for argmax one per stream.
constexpr int kStreams = 4;

struct Accumulators {
  int64_t dim, padded;
  float *sum, *weighted, *best, *stream_best;
  int32_t *argmax = nullptr, *stream_argmax;
  bool need_sum = false, need_weighted = false, need_max = false;

  Accumulators(const Pool& p, int64_t index, float* scratch)
      : dim(p.layout.dim),
        padded(round_up(dim)),
        sum(scratch),
        weighted(sum + padded),
        best(weighted + padded),
        stream_best(best + padded),
        stream_argmax(reinterpret_cast<int32_t*>(stream_best + kStreams * padded)) {
    for (int64_t m = 0; m < p.mode_count; ++m) {
      need_sum |= p.modes[m] == kMean || p.modes[m] == kMeanSqrtLen;
      need_weighted |= p.modes[m] == kWeightedMean;
      need_max |= p.modes[m] == kMax;
    }
    if (need_sum) fill(sum, padded, 0.0f);
    if (need_weighted) fill(weighted, padded, 0.0f);
    if (need_max) fill(best, padded, -__builtin_inff());
    if (p.argmax != nullptr) {
      argmax = p.argmax + index * dim;
      fill(argmax, dim, int32_t{-1});
    }
  }
  bool any() const { return need_sum || need_weighted || need_max; }
};

// Adds the tokens [begin, end). A long run is read in four places at once, a quarter of it apart: the processor fetches
// each ahead by itself, and one alone does not keep the memory busy.
template <class T>
void pool_span(const Accumulators& a, const Sequence& s, const T* x, int64_t stride, int64_t begin, int64_t end) {
  const int64_t quarter = end - begin < 2 * kStreams ? 0 : (end - begin) / kStreams;
  if (quarter > 0 && a.argmax != nullptr) {
    fill(a.stream_best, kStreams * a.padded, -__builtin_inff());
    fill(a.stream_argmax, kStreams * a.padded, static_cast<int32_t>(begin));
  }
  for (int64_t token = begin; token < begin + quarter; ++token) {
    const T* rows[kStreams];
    float weights[kStreams];
    for (int q = 0; q < kStreams; ++q) {
      rows[q] = x + (token + q * quarter) * stride;
      weights[q] = s.weight(token + q * quarter);
    }
    if (a.need_sum) add_rows(a.sum, rows, a.dim);
    if (a.need_weighted) add_weighted_rows(a.weighted, rows, weights, a.dim);
    if (a.need_max && a.argmax == nullptr) max_rows(a.best, rows, a.dim);
    for (int q = 0; a.argmax != nullptr && q < kStreams; ++q) {
      argmax_row(a.stream_best + q * a.padded, a.stream_argmax + q * a.padded, rows[q], a.dim, token + q * quarter);
    }
  }
  for (int q = 0; quarter > 0 && a.argmax != nullptr && q < kStreams; ++q) {
    merge_argmax(a.best, a.argmax, a.stream_best + q * a.padded, a.stream_argmax + q * a.padded, a.dim);
  }
  for (int64_t token = begin + kStreams * quarter; token < end; ++token) {
    const T* row[1] = {x + token * stride};
    const float weight[1] = {s.weight(token)};
    if (a.need_sum) add_rows(a.sum, row, a.dim);
    if (a.need_weighted) add_weighted_rows(a.weighted, row, weight, a.dim);
    if (a.need_max && a.argmax == nullptr) max_rows(a.best, row, a.dim);
    if (a.argmax != nullptr) argmax_row(a.best, a.argmax, row[0], a.dim, token);
  }
}

// One mode's result before conversion: a float32 row to divide, or a token's row as it is, or zeros.
template <class T>
struct Part {
  const float* sums = nullptr;
  const T* token = nullptr;
  float denominator = 1.0f;

  // Calls f(d, k, value) for every vector; the kind of part is asked for once, outside of the loop.
  template <class F>
  SENTFAST_INLINE void each(int64_t dim, F f) const {
    if (token != nullptr) {
      each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE { f(d, k, load(token + d, k)); });
    } else if (sums != nullptr) {
      each_vector(dim,
                  [&](int64_t d, auto k) SENTFAST_INLINE { f(d, k, Vec::load(sums + d) / Vec::fill(denominator)); });
    } else {
      each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE { f(d, k, Vec::zero()); });
    }
  }
};

template <class T>
const T* rows_of(const Pool& p, const Sequence& s) {
  return static_cast<const T*>(p.x) + s.index * p.stride_batch + s.origin * p.stride_token;
}

// The row that `cls` or `lasttoken` takes; nullptr if there is none.
template <class T>
const T* picked_row(const Pool& p, const Sequence& s, int64_t mode) {
  const int64_t token = picked(s, mode);
  return token >= 0 ? rows_of<T>(p, s) + token * p.stride_token : nullptr;
}

// Normalises and writes the parts of a sentence.
template <class T>
void write(const Pool& p, int64_t index, const Part<T>* parts) {
  const int64_t dim = p.layout.dim;
  float scale = 1.0f;
  if (p.normalize) {
    Vec squares = Vec::zero(), last = Vec::zero();
    for (int64_t m = 0; m < p.mode_count; ++m) {
      parts[m].each(dim, [&](int64_t, auto k, Vec value) SENTFAST_INLINE {
        last = only(value, k);
        squares = Vec::fma(last, last, squares);
      });
    }
    // A single number is not squared, as in PyTorch's vector_norm, so that it cannot leave the range.
    const float norm = p.mode_count * dim == 1 ? Vec::abs(last).sum() : __builtin_sqrtf(squares.sum());
    if (p.norm != nullptr) p.norm[index] = norm;
    scale = 1.0f / at_least(norm, kNormalizeEps);
  }
  T* out = static_cast<T*>(p.out) + index * p.mode_count * dim;
  for (int64_t m = 0; m < p.mode_count; ++m, out += dim) {
    parts[m].each(dim, [&, scaled = Vec::fill(scale), normalize = p.normalize](int64_t d, auto k, Vec value)
                           SENTFAST_INLINE { store(normalize ? value * scaled : value, out + d, k); });
  }
}

template <class T>
void pool_one(const Pool& p, int64_t index, float* scratch) {
  const Sequence s(p.layout, index);
  const Accumulators a(p, index, scratch);
  const int64_t dim = p.layout.dim;
  const T* x = rows_of<T>(p, s);
  Summary summary;
  for (int64_t begin = 0, end = 0; a.any() && s.next_span(begin, end);) {
    // A sentence of -inf alone has its maximum at its first token.
    if (a.argmax != nullptr && summary.count == 0) fill(a.argmax, dim, static_cast<int32_t>(begin));
    summary.add(s, begin, end);
    pool_span(a, s, x, p.stride_token, begin, end);
  }

  Part<T> parts[kMaxModes];
  for (int64_t m = 0; m < p.mode_count; ++m) {
    const int64_t mode = p.modes[m];
    if (picks(mode)) {
      parts[m].token = picked_row<T>(p, s, mode);
    } else {
      parts[m].sums = mode == kMax ? a.best : mode == kWeightedMean ? a.weighted : a.sum;
      if (mode != kMax) parts[m].denominator = summary.denominator(mode);
    }
  }
  write<T>(p, index, parts);
}

inline bool only_picks(const int64_t* modes, int64_t count) {
  bool all = true;
  for (int64_t m = 0; m < count; ++m) all &= picks(modes[m]);
  return all;
}

// The mask of a sentence is asked for, and the rows that `cls` and `lasttoken` take are found, while others are pooled.
constexpr int64_t kMaskAhead = 16, kRowsAhead = 4;

// Asks for what will be looked at: the line where `cls` starts, or the mask up to a length.
inline void prefetch_mask(const Layout& l, int64_t index, bool cls_alone) {
  if (l.mask == nullptr || l.mask_stride_token != 1) return;
  constexpr int64_t most = 4096;
  const char* row = static_cast<const char*>(l.mask) + index * l.mask_stride_batch * l.mask_bytes;
  const int64_t all = l.length * l.mask_bytes, bytes = cls_alone ? 1 : all < most ? all : most;
  for (int64_t byte = 0; byte < bytes; byte += 64) prefetch(row + byte);
}

// The rows that the modes take. Apart from `pool_one`, whose long way from row to row leaves fewer of them under way.
template <class T>
void find_picks(const Pool& p, int64_t index, Part<T>* parts) {
  const Sequence s(p.layout, index);
  for (int64_t m = 0; m < p.mode_count; ++m) {
    parts[m] = {};
    parts[m].token = picked_row<T>(p, s, p.modes[m]);
  }
}

template <class T>
void pool(const Pool& p, int64_t begin, int64_t end, float* scratch) {
  const bool picks_alone = only_picks(p.modes, p.mode_count);
  bool cls_alone = true;
  for (int64_t m = 0; m < p.mode_count; ++m) cls_alone &= p.modes[m] == kCls;
  constexpr int64_t places = 2 * kRowsAhead;  // more than are found and not yet written
  Part<T> found[places][kMaxModes];
  for (int64_t i = begin - kMaskAhead; i < end; ++i) {
    const int64_t mask = i + kMaskAhead, rows = i + kRowsAhead;
    if (mask < end) prefetch_mask(p.layout, mask, cls_alone);
    if (picks_alone && rows >= begin && rows < end) find_picks(p, rows, found[rows % places]);
    if (i >= begin) picks_alone ? write(p, i, found[i % places]) : pool_one<T>(p, i, scratch);
  }
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
    each_vector(width,
                [&](int64_t d, auto k) SENTFAST_INLINE { sum = Vec::fma(load(grad + d, k), load(out + d, k), sum); });
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

  void write(T* row, int64_t dim, float weight, int64_t token) const {
    each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
      Vec value = constant != nullptr ? Vec::load(constant + d) : Vec::zero();
      if (weighted != nullptr) value = Vec::fma(Vec::fill(weight), Vec::load(weighted + d), value);
      if (best != nullptr) {
        const auto here = Vec::equal(Vec::load_index(argmax + d, k.count), static_cast<int32_t>(token));
        value = Vec::select(here, value + Vec::load(best + d), value);
      }
      store(value, row + d, k);
    });
  }
};

template <class T>
void write_zeros(T* rows, int64_t n) {
  __builtin_memset(rows, 0, static_cast<size_t>(n) * sizeof(T));
}

template <class T>
void pool_backward_one(const PoolBackward& p, int64_t index, float* scratch) {
  const Sequence s(p.layout, index);
  const int64_t dim = p.layout.dim, padded = round_up(dim);
  float *constant = scratch, *weighted = scratch + padded, *best = scratch + 2 * padded;
  float* grad_pooled = scratch + 3 * padded;
  unnormalized_gradient<T>(p, index, grad_pooled);

  const Summary summary = only_picks(p.modes, p.mode_count) ? Summary() : summarize(s);

  TokenGradient<T> token_gradient;
  const auto accumulate = [&](const float** slot, float* row, const float* part, float denominator) {
    if (*slot == nullptr) fill(row, padded, 0.0f);
    *slot = row;
    each_vector(dim, [&](int64_t d, auto) SENTFAST_INLINE {
      (Vec::load(row + d) + Vec::load(part + d) / Vec::fill(denominator)).store(row + d);
    });
  };
  for (int64_t m = 0; m < p.mode_count; ++m) {
    const int64_t mode = p.modes[m];
    const float* part = grad_pooled + m * padded;
    if (picks(mode)) continue;  // adds to one row, afterwards
    if (mode == kMax) {
      accumulate(&token_gradient.best, best, part, 1.0f);
      token_gradient.argmax = p.argmax + index * dim;
    } else if (mode == kWeightedMean) {
      accumulate(&token_gradient.weighted, weighted, part, summary.denominator(mode));
    } else {
      accumulate(&token_gradient.constant, constant, part, summary.denominator(mode));
    }
  }

  T* grad_x = static_cast<T*>(p.grad_x) + (p.layout.cu_seqlens != nullptr ? s.origin : index * s.length) * dim;
  const bool every_token =
      token_gradient.constant != nullptr || token_gradient.weighted != nullptr || token_gradient.best != nullptr;
  int64_t written = 0;
  for (int64_t begin = 0, end = 0; every_token && s.next_span(begin, end); written = end) {
    write_zeros(grad_x + written * dim, (begin - written) * dim);
    for (int64_t token = begin; token < end; ++token) {
      token_gradient.write(grad_x + token * dim, dim, s.weight(token), token);
    }
  }
  write_zeros(grad_x + written * dim, (s.length - written) * dim);

  for (int64_t m = 0; m < p.mode_count; ++m) {
    const int64_t token = picks(p.modes[m]) ? picked(s, p.modes[m]) : -1;
    if (token < 0) continue;
    T* row = grad_x + token * dim;
    each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
      store(load(row + d, k) + Vec::load(grad_pooled + m * padded + d), row + d, k);
    });
  }
}

template <class T>
void pool_backward(const PoolBackward& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = begin; i < end; ++i) pool_backward_one<T>(p, i, scratch);
}

}  // namespace pooling
