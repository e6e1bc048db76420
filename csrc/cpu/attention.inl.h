// Attention of each sequence to itself, one head at a time. Keys are packed as the columns of a matrix product and
// values as its rows, once per head; then a strip of queries at a time makes its scores, their softmax, and the
// weighted sum of the values. A row of scores is a few kilobytes, so nothing is recomputed.

namespace attention {

constexpr int kRows = Vec::tile_rows;
constexpr int kTileColumns = Vec::tile_vectors * Vec::lanes;

// Scratch of one task, cut into its parts. Strides in Words.
template <class Step>
struct Head {
  using Element = typename Step::Element;
  int64_t length, steps, width;  // keys; Words in a query; columns of packed values
  int64_t row_stride;            // of scores and weights
  Word *keys, *values;           // panels of 64 keys; pairs of rows if a Word is a pair
  float* scores;
  Element* weights;
  const Element *q, *k, *v;
  int64_t head, begin;  // begin: first row of the sequence

  Head(const Attention& p, int64_t task, void* memory) {
    const int64_t sequence = task / p.heads;
    head = task % p.heads;
    begin = p.cu_seqlens[sequence];
    length = p.cu_seqlens[sequence + 1] - begin;
    steps = p.head_dim / Step::depth;
    width = round_up(p.head_dim);
    const auto of = [&](const Rows& rows) {
      return static_cast<const Element*>(rows.data) + begin * rows.stride + head * p.head_dim;
    };
    q = of(p.q);
    k = of(p.k);
    v = of(p.v);
    const int64_t padded = (length + kPanel - 1) / kPanel * kPanel;
    row_stride = padded + 16;  // rows a power of two apart would share the same few places of the first cache
    const auto address = (reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64;
    keys = reinterpret_cast<Word*>(address);
    values = keys + padded * steps;
    scores = reinterpret_cast<float*>(values + (padded + Step::depth - 1) / Step::depth * width);
    weights = reinterpret_cast<Element*>(scores + kRows * row_stride);
  }
};

// Rows become panels of 64 keys: word (step, key) goes to panels[key / 64][step][key % 64]; missing keys that a tile
// reads are zero.
inline void turn_keys(const Word* rows, int64_t stride, int64_t length, int64_t steps, Word* panels) {
  for (int64_t begin = 0; begin < length; begin += kPanel) {
    const int64_t count = length - begin < kPanel ? length - begin : kPanel;
    gemm::turn(rows + begin * stride, stride, count, steps, round_up(count), panels + begin * steps);
  }
}

// Row by row, or two rows as one row of pairs; columns up to `width` are zero.
template <class Step>
void pack_values(const Attention& p, const Head<Step>& h) {
  for (int64_t i = 0; i < h.length; i += Step::depth) {
    Word* to = h.values + i / Step::depth * h.width;
    if constexpr (Step::depth == 1) {
      const Word* from = reinterpret_cast<const Word*>(h.v + i * p.v.stride);
      for (int64_t d = 0; d < p.head_dim; ++d) to[d] = from[d];
    } else {
      const auto* low = h.v + i * p.v.stride;
      const auto* high = i + 1 < h.length ? low + p.v.stride : nullptr;
      for (int64_t d = 0; d < p.head_dim; ++d) {
        to[d] = low[d].bits | (high != nullptr ? static_cast<uint32_t>(high[d].bits) << 16 : 0u);
      }
    }
    for (int64_t d = p.head_dim; d < h.width; ++d) to[d] = 0;
  }
}

// scores[i][key] = <q_i, k_key> * scale + bias, for R queries and V vectors of keys from `key`.
template <class Step, int R, int V>
SENTFAST_INLINE inline void score_tile(const Attention& p, const Head<Step>& h, int64_t row, int64_t key) {
  Vec sum[R][V];
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < V; ++j) sum[i][j] = Vec::zero();
  }
  const Word* q = reinterpret_cast<const Word*>(h.q + row * p.q.stride);
  const Word* k = h.keys + key / kPanel * kPanel * h.steps + key % kPanel;
  gemm::accumulate<Step, R, V>(sum, q, p.q.stride / Step::depth, k, kPanel, h.steps);
  const Vec scale = Vec::fill(p.scale);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    float* to = h.scores + i * h.row_stride + key;
    const float* bias = nullptr;
    if (p.bias != nullptr) bias = p.bias + h.head * (2 * p.bias_reach - 1) + p.bias_reach - 1 + key - (row + i);
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      Vec value = sum[i][j] * scale;
      const int64_t left = h.length - key - j * Vec::lanes;
      if (bias != nullptr && left > 0) {
        const float* from = bias + j * Vec::lanes;
        value = value + (left >= Vec::lanes ? Vec::load(from) : Vec::load(from, static_cast<int>(left)));
      }
      value.store(to + j * Vec::lanes);
    }
  }
}

struct Softmax {
  float highest, sum;  // of the scores; of their exponentials, the highest's being 1
};

// weights = exp(scores - highest) for keys [begin, end), zero for the others of [first, last).
template <class Element>
Softmax softmax(const float* scores, Element* weights, int64_t first, int64_t begin, int64_t end, int64_t last) {
  constexpr bool exact = sizeof(Element) == 4;
  const float* from = scores + begin;
  const int64_t count = end - begin;
  const Vec lowest = Vec::fill(-__builtin_inff());
  Vec top = lowest;
  each_vector(count, [&](int64_t d, auto k) SENTFAST_INLINE {
    const Vec x = load(from + d, k);
    if constexpr (sizeof(k) == sizeof(Full)) {
      top = Vec::max(top, x);
    } else {
      top = Vec::max(top, Vec::select(Vec::first_lanes(k.count), x, lowest));
    }
  });
  const float highest = top.highest();
  // The difference first: what rounding leaves of highest * log2(e) is large where scores are.
  const Vec log2e = Vec::fill(math::kLog2E), shift = Vec::fill(highest);
  Vec sum = Vec::zero();
  Element* to = weights + begin;
  for (int64_t d = first; d < begin; ++d) weights[d] = Element{};
  each_vector(count, [&](int64_t d, auto k) SENTFAST_INLINE {
    const Vec x = only(math::exp2<exact>((load(from + d, k) - shift) * log2e), k);
    sum = sum + x;
    store(x, to + d, k);
  });
  for (int64_t d = end; d < last; ++d) weights[d] = Element{};
  return {highest, sum.sum()};
}

// Keys [first, last) that dropout takes; the scale of the others goes with the sum. first: a multiple of a panel.
template <class Element>
void drop(const Dropout& p, int64_t row, int64_t head, int64_t first, int64_t last, Element* weights) {
  dropout::each_mask(p, row, head, first, last, [&](int64_t key, auto k, Vec::Mask mask) SENTFAST_INLINE {
    store(Vec::select(mask, load(weights + key, k), Vec::zero()), weights + key, k);
  });
}

struct Span {
  int64_t begin, end;
};

// The keys that a query sees.
inline Span seen(const Attention& p, int64_t query, int64_t length) {
  return {p.left >= 0 && query > p.left ? query - p.left : 0,
          p.right >= 0 && query + p.right + 1 < length ? query + p.right + 1 : length};
}

// out[i] = weights[i] values / sum[i] for R queries and V vectors of columns; keys [first, last).
template <class Step, int R, int V>
SENTFAST_INLINE inline void value_tile(const Attention& p, const Head<Step>& h, const float* sums, int64_t first,
                                       int64_t last, int64_t column, typename Step::Element* out) {
  Vec sum[R][V];
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < V; ++j) sum[i][j] = Vec::zero();
  }
  const Word* weights = reinterpret_cast<const Word*>(h.weights + first);
  const Word* values = h.values + first / Step::depth * h.width + column;
  const int64_t steps = (last - first + Step::depth - 1) / Step::depth;
  gemm::accumulate<Step, R, V>(sum, weights, h.row_stride / Step::depth, values, h.width, steps);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    const Vec scale = Vec::fill(1.0f / sums[i]);
    auto* to = out + i * p.heads * p.head_dim + column;
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      const int64_t left = p.head_dim - column - j * Vec::lanes;
      if (left >= Vec::lanes) {
        (sum[i][j] * scale).store(to + j * Vec::lanes);
      } else if (left > 0) {
        (sum[i][j] * scale).store(to + j * Vec::lanes, static_cast<int>(left));
      }
    }
  }
}

template <class Step, int R>
void strip(const Attention& p, const Head<Step>& h, int64_t row, typename Step::Element* out) {
  // The keys that any of the rows sees, from the start of a panel.
  const int64_t first = seen(p, row, h.length).begin / kPanel * kPanel, last = seen(p, row + R - 1, h.length).end;
  for (int64_t key = first; key < last; key += kTileColumns) {
    gemm::with_vectors((last - key + Vec::lanes - 1) / Vec::lanes,
                       [&](auto v) SENTFAST_INLINE { score_tile<Step, R, decltype(v)::value>(p, h, row, key); });
  }
  using Element = typename Step::Element;
  const int64_t whole = (last + Step::depth - 1) / Step::depth * Step::depth;
  float sums[R];
  for (int i = 0; i < R; ++i) {
    const Span keys = seen(p, row + i, h.length);
    Element* weights = h.weights + i * h.row_stride;
    const Softmax found = softmax(h.scores + i * h.row_stride, weights, first, keys.begin, keys.end, whole);
    if (p.lse != nullptr) {
      p.lse[h.head * p.lse_stride + h.begin + row + i] = found.highest + __builtin_logf(found.sum);
    }
    sums[i] = found.sum;
    if (p.dropout.threshold != 0) {
      drop(p.dropout, h.begin + row + i, h.head, first, whole, weights);
      sums[i] /= p.dropout.scale;
    }
  }
  for (int64_t column = 0; column < h.width; column += kTileColumns) {
    gemm::with_vectors((h.width - column) / Vec::lanes, [&](auto v) SENTFAST_INLINE {
      value_tile<Step, R, decltype(v)::value>(p, h, sums, first, whole, column, out);
    });
  }
}

template <class Step>
void attention(const Attention& p, int64_t begin, int64_t end, void* memory) {
  const int64_t hidden = p.heads * p.head_dim;
  for (int64_t task = begin; task < end; ++task) {
    const Head<Step> h(p, task, memory);
    if (h.length == 0) continue;
    turn_keys(reinterpret_cast<const Word*>(h.k), p.k.stride / Step::depth, h.length, h.steps, h.keys);
    pack_values(p, h);
    const int64_t sequence = task / p.heads, queries = p.first_row_only ? 1 : h.length;
    const int64_t first_out = p.first_row_only ? sequence : p.cu_seqlens[sequence];
    auto* out = static_cast<typename Step::Element*>(p.out) + first_out * hidden + h.head * p.head_dim;
    for (int64_t row = 0; row < queries; row += kRows) {
      gemm::with_rows(queries - row,
                      [&](auto r) SENTFAST_INLINE { strip<Step, decltype(r)::value>(p, h, row, out + row * hidden); });
    }
  }
}

}  // namespace attention
