// y = activation(x w^T + bias) with weights in panels of 64 output features: a panel, or of a deep one a part that fits
// the second cache, is multiplied with every row before the next is touched. Sums go through the first cache on their
// way to y, so that bias and activation need not be unrolled into the tile. A weight that is not in panels is for
// linear_in_place.inl.h.

namespace linear {

constexpr int kTileColumns = Vec::tile_vectors * Vec::lanes;

// A panel's steps [begin, begin + count).
struct Part {
  const Word* weight;  // of the first step
  int64_t begin, count;
};

// sums[i] += of R rows by one tile of columns; rows of sums are kPanel apart.
template <class Step, int R>
SENTFAST_INLINE inline void tile(const Linear& p, const Part& part, int64_t row, int64_t inside, float* sums) {
  constexpr int V = Vec::tile_vectors;
  Vec sum[R][V];
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < V; ++j) {
      sum[i][j] = Vec::zero();
    }
  }
  const int64_t stride = p.stride_x / Step::depth;
  const Word* x = reinterpret_cast<const Word*>(p.x) + row * stride + part.begin;
  gemm::accumulate<Step, R, V>(sum, x, stride, part.weight + inside, kPanel, part.count);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      float* to = sums + i * kPanel + inside + j * Vec::lanes;
      (part.begin == 0 ? sum[i][j] : sum[i][j] + Vec::load(to)).store(to);
    }
  }
}

// y = activation(sums + bias) for `rows` rows of a panel, while they are in the first cache.
template <class Out, class A>
void finish(const Linear& p, int64_t row, int64_t rows, int64_t panel, const float* sums) {
  const int64_t begin = panel * kPanel, columns = p.columns - begin < kPanel ? p.columns - begin : kPanel;
  for (int64_t i = 0; i < rows; ++i) {
    Out* y = static_cast<Out*>(p.y) + (row + i) * p.stride_y + begin;
    each_vector(columns, [&](int64_t d, auto k) SENTFAST_INLINE {
      Vec value = load(sums + i * kPanel + d, k);
      if (p.bias != nullptr) value = value + load(p.bias + begin + d, k);
      store(A::of(value), y + d, k);
    });
  }
}

// Asks for a share of the words that are multiplied next.
inline void prefetch_share(const Word* next, int64_t words, int64_t share, int64_t shares) {
  constexpr int64_t line = 16;
  for (int64_t w = words * share / shares / line * line; w < words * (share + 1) / shares; w += line) {
    __builtin_prefetch(next + w, 0, 2);
  }
}

template <class Step, class Out>
void linear(const Linear& p, const LinearBlock& b) {
  constexpr bool exact = Step::depth == 1;
  if (Step::depth == 1 && p.stride_weight > 0) return in_place(p, b);
  const int64_t steps = (p.depth + Step::depth - 1) / Step::depth;
  const int64_t parts = (steps + kBlockSteps - 1) / kBlockSteps, size = (steps + parts - 1) / parts;
  const Word* weight = static_cast<const Word*>(p.weight);
  const int64_t strips = (b.row_end - b.row_begin + Vec::tile_rows - 1) / Vec::tile_rows;
  for (int64_t panel = b.panel_begin; panel < b.panel_end; ++panel) {
    for (int64_t begin = 0; begin < steps; begin += size) {
      const int64_t count = steps - begin < size ? steps - begin : size;
      const bool last = begin + count == steps, more = !last || panel + 1 < b.panel_end;
      const Part part = {weight + (panel * steps + begin) * kPanel, begin, count};
      for (int64_t strip = 0; strip < strips; ++strip) {
        if (more) prefetch_share(part.weight + count * kPanel, count * kPanel, strip, strips);
        const int64_t row = b.row_begin + strip * Vec::tile_rows;
        float* sums = b.scratch + strip * Vec::tile_rows * kPanel;
        gemm::with_rows(b.row_end - row, [&](auto r) SENTFAST_INLINE {
          for (int64_t inside = 0; inside < kPanel; inside += kTileColumns) {
            tile<Step, decltype(r)::value>(p, part, row, inside, sums);
          }
          if (!last) return;
          math::with_activation<exact>(
              p.activation, [&](auto a) { finish<Out, decltype(a)>(p, row, decltype(r)::value, panel, sums); });
        });
      }
    }
  }
}

// Sixteen Words of each row at a time: made in the first cache, then turned.
template <class Step, class T>
void pack_panel(const PackPanel& p) {
  using Element = typename Step::Element;
  constexpr int64_t words = 16, elements = words * Step::depth;
  Word* panel = static_cast<Word*>(p.panel);
  alignas(64) Word lines[kPanel * words];
  for (int64_t column = 0; column < p.columns; column += elements) {
    const int64_t count = p.columns - column < elements ? p.columns - column : elements;
    const int64_t steps = (count + Step::depth - 1) / Step::depth;
    for (int64_t row = 0; row < p.rows; ++row) {
      const T* from = static_cast<const T*>(p.weight) + row * p.stride + column;
      prefetch(from + elements);
      lines[row * words + steps - 1] = 0;  // the second half of an odd last pair
      Element* element = reinterpret_cast<Element*>(lines + row * words);
      each_vector(count, [&](int64_t d, auto k) SENTFAST_INLINE { store(load(from + d, k), element + d, k); });
    }
    gemm::turn(lines, words, p.rows, steps, kPanel, panel + column / Step::depth * kPanel);
  }
}

}  // namespace linear
