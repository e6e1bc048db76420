// The gradient of attention, one head of one sequence at a time. The softmax is made again from the scores, for a block
// of queries at a time; all products run in float32.
//
// With P = softmax(S), D = dropout(P) and delta = sum(P grad_p) of each query:
// grad_v = D^T grad, grad_p = dropout(grad v^T), grad_s = P (grad_p - delta), grad_q = grad_s k, grad_k = grad_s^T q.

namespace attention_backward {

using Step = gemm::Float32Step;

// c = a b, or c += a b. Whole vectors of columns; rows of a, b and c are their strides apart.
template <bool Add>
void product(int64_t rows, int64_t steps, int64_t columns, const float* a, int64_t stride_a, const float* b,
             int64_t stride_b, float* c, int64_t stride_c) {
  constexpr int64_t tile = Vec::tile_vectors * Vec::lanes;
  for (int64_t row = 0; row < rows; row += Vec::tile_rows) {
    gemm::with_rows(rows - row, [&](auto r) SENTFAST_INLINE {
      constexpr int R = decltype(r)::value;
      for (int64_t column = 0; column < columns; column += tile) {
        gemm::with_vectors((columns - column) / Vec::lanes, [&](auto v) SENTFAST_INLINE {
          constexpr int V = decltype(v)::value;
          Vec sum[R][V];
          float* to = c + row * stride_c + column;
          for (int i = 0; i < R; ++i) {
            for (int j = 0; j < V; ++j) {
              sum[i][j] = Add ? Vec::load(to + i * stride_c + j * Vec::lanes) : Vec::zero();
            }
          }
          gemm::accumulate<Step, R, V>(sum, reinterpret_cast<const Word*>(a + row * stride_a), stride_a,
                                       reinterpret_cast<const Word*>(b + column), stride_b, steps);
          for (int i = 0; i < R; ++i) {
            for (int j = 0; j < V; ++j) sum[i][j].store(to + i * stride_c + j * Vec::lanes);
          }
        });
      }
    });
  }
}

// Scratch of one task, cut into its parts; rows are `width` floats.
struct Work {
  int64_t padded, width, row_stride;
  float *keys, *values;                   // panels of 64 keys
  float *q, *k, *grad, *grad_k, *grad_v;  // a row per token
  float *weights, *scores, *dropped;      // of a block of queries: S, then P; grad v^T, then grad_s; D
  float *weights_turned, *scores_turned;  // a row of queries per key
  float* grad_q;

  Work(int64_t length, int64_t head_dim, void* memory) {
    padded = (length + kPanel - 1) / kPanel * kPanel;
    width = round_up(head_dim);
    row_stride = padded + 16;
    auto* next = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
    const auto take = [&](int64_t count) {
      float* const found = next;
      next += count;
      return found;
    };
    keys = take(padded * head_dim);
    values = take(padded * head_dim);
    q = take(padded * width);
    k = take(padded * width);
    grad = take(padded * width);
    grad_k = take(padded * width);
    grad_v = take(padded * width);
    weights = take(kBackwardQueries * row_stride);
    scores = take(kBackwardQueries * row_stride);
    dropped = take(kBackwardQueries * row_stride);
    weights_turned = take(padded * kPanel);
    scores_turned = take(padded * kPanel);
    grad_q = take(kBackwardQueries * width);
  }
};

struct Task {
  int64_t head, begin, length;  // begin: first token
};

template <class T>
void widen(const Rows& from, const Task& t, int64_t head_dim, int64_t width, float* out) {
  for (int64_t i = 0; i < t.length; ++i) {
    const T* row = static_cast<const T*>(from.data) + (t.begin + i) * from.stride + t.head * head_dim;
    each_vector(head_dim, [&](int64_t d, auto k) SENTFAST_INLINE { store(load(row + d, k), out + i * width + d, k); });
    for (int64_t d = head_dim; d < width; ++d) out[i * width + d] = 0.0f;
  }
}

template <class T>
void narrow(const float* from, int64_t width, float scale, const AttentionBackward& p, const Task& t, int64_t begin,
            int64_t rows, void* to) {
  const int64_t head_dim = p.forward.head_dim;
  const Vec factor = Vec::fill(scale);
  for (int64_t i = 0; i < rows; ++i) {
    T* row = static_cast<T*>(to) + (t.begin + begin + i) * p.grad_stride + t.head * head_dim;
    each_vector(head_dim,
                [&](int64_t d, auto k) SENTFAST_INLINE { store(load(from + i * width + d, k) * factor, row + d, k); });
  }
}

template <class T>
void prepare(const AttentionBackward& p, const Task& t, const Work& w) {
  const Attention& f = p.forward;
  const auto turn = [&](const float* rows, float* panels) {
    attention::turn_keys(reinterpret_cast<const Word*>(rows), w.width, t.length, f.head_dim,
                         reinterpret_cast<Word*>(panels));
  };
  widen<T>(f.v, t, f.head_dim, w.width, w.grad_v);  // until it is turned
  turn(w.grad_v, w.values);
  widen<T>(p.grad, t, f.head_dim, w.width, w.grad);
  widen<T>(f.q, t, f.head_dim, w.width, w.q);
  widen<T>(f.k, t, f.head_dim, w.width, w.k);
  turn(w.k, w.keys);
  fill(w.grad_k, t.length * w.width, 0.0f);
  fill(w.grad_v, t.length * w.width, 0.0f);
}

// One query's rows of a block, for keys [first, last); first: a multiple of a panel.
struct Row {
  float *weights, *scores, *dropped;
  int64_t first, last;
};

// S becomes P.
inline void weigh(const Attention& p, const Task& t, int64_t query, const Row& r) {
  const attention::Span keys = attention::seen(p, query, t.length);
  const int64_t biases = 2 * p.bias_reach - 1;
  const float* bias = p.bias != nullptr ? p.bias + t.head * biases + p.bias_reach - 1 - query : nullptr;
  const Vec scale = Vec::fill(p.scale);
  each_vector(keys.end - keys.begin, [&](int64_t d, auto k) SENTFAST_INLINE {
    const int64_t key = keys.begin + d;
    const Vec x = load(r.weights + key, k) * scale;
    store(bias != nullptr ? x + load(bias + key, k) : x, r.weights + key, k);
  });
  const attention::Softmax found = attention::softmax(r.weights, r.weights, r.first, keys.begin, keys.end, r.last);
  const Vec inverse = Vec::fill(1.0f / found.sum);
  each_vector(keys.end - keys.begin, [&](int64_t d, auto k) SENTFAST_INLINE {
    store(load(r.weights + keys.begin + d, k) * inverse, r.weights + keys.begin + d, k);
  });
  // Other keys' values may be inf or NaN.
  for (int64_t d = r.first; d < keys.begin; ++d) r.scores[d] = 0.0f;
  for (int64_t d = keys.end; d < r.last; ++d) r.scores[d] = 0.0f;
}

// grad v^T becomes grad_p, and D is made of P.
inline void drop(const Dropout& p, const Task& t, int64_t query, const Row& r) {
  const Vec scale = Vec::fill(p.scale);
  const auto keep = [&](int64_t key, auto k, Vec::Mask mask) SENTFAST_INLINE {
    store(Vec::select(mask, load(r.scores + key, k) * scale, Vec::zero()), r.scores + key, k);
    store(Vec::select(mask, load(r.weights + key, k), Vec::zero()), r.dropped + key, k);
  };
  dropout::each_mask(p, t.begin + query, t.head, r.first, r.last, keep);
}

// grad_p becomes grad_s, which adds to the gradient of the biases.
inline void differentiate(const Attention& p, const Task& t, int64_t query, const Row& r, float* grad_bias) {
  const int64_t keys = r.last - r.first;
  Vec total = Vec::zero();
  each_vector(keys, [&](int64_t d, auto k) SENTFAST_INLINE {
    total = Vec::fma(only(load(r.weights + r.first + d, k), k), only(load(r.scores + r.first + d, k), k), total);
  });
  const Vec delta = Vec::fill(total.sum());
  const int64_t biases = 2 * p.bias_reach - 1;
  float* sums = grad_bias != nullptr ? grad_bias + t.head * biases + p.bias_reach - 1 - query : nullptr;
  each_vector(keys, [&](int64_t d, auto k) SENTFAST_INLINE {
    const int64_t key = r.first + d;
    const Vec grad = load(r.weights + key, k) * (load(r.scores + key, k) - delta);
    store(grad, r.scores + key, k);
    if (sums != nullptr) store(load(sums + key, k) + grad, sums + key, k);
  });
}

// Queries [begin, begin + count).
template <class T>
void block(const AttentionBackward& p, const Task& t, const Work& w, int64_t begin, int64_t count, float* grad_bias) {
  const Attention& f = p.forward;
  const int64_t first = attention::seen(f, begin, t.length).begin / kPanel * kPanel;
  const int64_t last = attention::seen(f, begin + count - 1, t.length).end, keys = last - first;
  const float *q = w.q + begin * w.width, *grad = w.grad + begin * w.width;
  for (int64_t panel = first; panel < last; panel += kPanel) {
    const int64_t width = round_up(t.length - panel < kPanel ? t.length - panel : kPanel);
    const int64_t at = panel * f.head_dim;
    product<false>(count, f.head_dim, width, q, w.width, w.keys + at, kPanel, w.weights + panel, w.row_stride);
    product<false>(count, f.head_dim, width, grad, w.width, w.values + at, kPanel, w.scores + panel, w.row_stride);
  }
  const bool drops = f.dropout.threshold != 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = i * w.row_stride;
    const Row r = {w.weights + at, w.scores + at, w.dropped + at, first, last};
    weigh(f, t, begin + i, r);
    if (drops) drop(f.dropout, t, begin + i, r);
    differentiate(f, t, begin + i, r, grad_bias);
  }
  const auto turn = [&](const float* from, float* to) {
    gemm::turn(reinterpret_cast<const Word*>(from + first), w.row_stride, count, keys, round_up(count),
               reinterpret_cast<Word*>(to));
  };
  turn(drops ? w.dropped : w.weights, w.weights_turned);
  product<true>(keys, count, w.width, w.weights_turned, kPanel, grad, w.width, w.grad_v + first * w.width, w.width);
  turn(w.scores, w.scores_turned);
  product<true>(keys, count, w.width, w.scores_turned, kPanel, q, w.width, w.grad_k + first * w.width, w.width);
  product<false>(count, keys, w.width, w.scores + first, w.row_stride, w.k + first * w.width, w.width, w.grad_q,
                 w.width);
  narrow<T>(w.grad_q, w.width, f.scale, p, t, begin, count, p.grad_q);
}

template <class T>
void sequence(const AttentionBackward& p, const Task& t, float* grad_bias, void* memory) {
  const Attention& f = p.forward;
  const Work w(t.length, f.head_dim, memory);
  prepare<T>(p, t, w);
  for (int64_t begin = 0; begin < t.length; begin += kBackwardQueries) {
    const int64_t count = t.length - begin < kBackwardQueries ? t.length - begin : kBackwardQueries;
    block<T>(p, t, w, begin, count, grad_bias);
  }
  narrow<T>(w.grad_k, w.width, f.scale, p, t, 0, t.length, p.grad_k);
  narrow<T>(w.grad_v, w.width, f.dropout.threshold != 0 ? f.dropout.scale : 1.0f, p, t, 0, t.length, p.grad_v);
}

template <class T>
void backward(const AttentionBackward& p, int64_t begin, int64_t end, void* memory) {
  const Attention& f = p.forward;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / f.heads, head = task % f.heads;
    float* grad_bias = p.grad_bias != nullptr ? p.grad_bias + part * f.heads * (2 * f.bias_reach - 1) : nullptr;
    for (int64_t i = p.parts[part]; i < p.parts[part + 1]; ++i) {
      const Task t = {head, f.cu_seqlens[i], f.cu_seqlens[i + 1] - f.cu_seqlens[i]};
      if (t.length > 0) sequence<T>(p, t, grad_bias, memory);
    }
  }
}

}  // namespace attention_backward
