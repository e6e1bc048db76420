// c = a b in float32 for the products of training: b goes part by part, 64 columns by 256 steps, into a panel that fits
// the second cache; a is read in place where its steps lie side by side, and else turned, a block of rows at a time.

namespace product {

constexpr int kTileColumns = Vec::tile_vectors * Vec::lanes;

// Steps [begin, begin + count) of columns [column, column + width).
struct Part {
  int64_t begin, count, column, width;
};

inline void fill_panel(const Product& p, const Part& part, float* panel) {
  const float* from = p.b + part.begin * p.b_step + part.column * p.b_column;
  if (p.b_step == 1) {  // a row of b^T holds the steps of a column
    gemm::turn(reinterpret_cast<const Word*>(from), p.b_column, part.width, part.count, kPanel,
               reinterpret_cast<Word*>(panel));
    return;
  }
  for (int64_t s = 0; s < part.count; ++s) {
    each_vector(part.width, [&](int64_t d, auto k) SENTFAST_INLINE {
      store(load(from + s * p.b_step + d, k), panel + s * kPanel + d, k);
    });
    for (int64_t d = part.width; d < kPanel; ++d) panel[s * kPanel + d] = 0.0f;
  }
}

// Asks for a share of the part that is multiplied next.
inline void prefetch_part(const Product& p, const Part& next, int64_t share, int64_t shares) {
  const float* from = p.b + next.begin * p.b_step + next.column * p.b_column;
  const bool turned = p.b_step == 1;
  const int64_t lines = turned ? next.width : next.count, length = turned ? next.count : next.width;
  const int64_t stride = turned ? p.b_column : p.b_step;
  for (int64_t line = lines * share / shares; line < lines * (share + 1) / shares; ++line) {
    for (int64_t d = 0; d < length; d += 16) __builtin_prefetch(from + line * stride + d, 0, 2);
  }
}

// Rows of a as a tile reads them.
struct Lines {
  const float* data;
  int64_t stride;
};

inline Lines lines_of(const Product& p, int64_t row, int64_t rows, int64_t begin, int64_t count, float* scratch) {
  const float* from = p.a + row * p.a_row + begin * p.a_step;
  if (p.a_step == 1) return {from, p.a_row};
  constexpr int64_t stride = kProductSteps + 16;  // a power of two would share the same few places of the first cache
  for (int64_t s = 0; s < count; s += kPanel) {
    const int64_t left = count - s < kPanel ? count - s : kPanel;
    gemm::turn(reinterpret_cast<const Word*>(from + s * p.a_step), p.a_step, left, rows, round_up(left),
               reinterpret_cast<Word*>(scratch + s), stride);
  }
  return {scratch, stride};
}

template <int R>
SENTFAST_INLINE inline void tile(const Product& p, const Part& part, const float* a, int64_t stride_a, int64_t row,
                                 int64_t inside, const float* panel) {
  constexpr int V = Vec::tile_vectors;
  Vec sum[R][V];
  float* c = p.c + row * p.stride_c + part.column + inside;
  for (int i = 0; i < R; ++i) {
    __builtin_prefetch(c + i * p.stride_c, 1, 3);
    for (int j = 0; j < V; ++j) sum[i][j] = Vec::zero();
  }
  gemm::accumulate<gemm::Float32Step, R, V>(sum, reinterpret_cast<const Word*>(a), stride_a,
                                            reinterpret_cast<const Word*>(panel + inside), kPanel, part.count);
  const float* bias = part.begin == 0 && p.bias != nullptr ? p.bias + part.column + inside : nullptr;
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) {
    const int64_t left = part.width - inside - j * Vec::lanes;
    if (left <= 0) break;
    const int n = left < Vec::lanes ? static_cast<int>(left) : Vec::lanes;
    const Vec shift = bias != nullptr ? Vec::load(bias + j * Vec::lanes, n) : Vec::zero();
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      float* to = c + i * p.stride_c + j * Vec::lanes;
      const Vec value = sum[i][j] + (part.begin > 0 ? Vec::load(to, n) : shift);
      n < Vec::lanes ? value.store(to, n) : value.store(to);
    }
  }
}

// At most kProductRows rows.
inline void product(const Product& p, const Block& b, float* scratch) {
  float *panel = scratch, *turned = scratch + kProductSteps * kPanel;
  // A depth of 0 is one part of nothing, which makes zeros.
  const int64_t parts = p.depth > 0 ? (p.depth + kProductSteps - 1) / kProductSteps : 1;
  const int64_t size = (p.depth + parts - 1) / parts, rows = b.row_end - b.row_begin;
  const int64_t strips = (rows + Vec::tile_rows - 1) / Vec::tile_rows;
  const auto part = [&](int64_t at, int64_t column) {
    const int64_t left = b.column_end - column, steps = p.depth - at * size;
    return Part{at * size, steps < size ? steps : size, column, left < kPanel ? left : kPanel};
  };
  for (int64_t at = 0; at < parts; ++at) {
    const Part first = part(at, b.column_begin);
    const Lines a = lines_of(p, b.row_begin, rows, first.begin, first.count, turned);
    for (int64_t column = b.column_begin; column < b.column_end; column += kPanel) {
      const Part here = part(at, column);
      fill_panel(p, here, panel);
      const bool last = column + kPanel >= b.column_end;
      const bool more = !last || at + 1 < parts;
      const Part next = last ? part(at + 1, b.column_begin) : part(at, column + kPanel);
      for (int64_t strip = 0; strip < strips; ++strip) {
        if (more) prefetch_part(p, next, strip, strips);
        const int64_t i = strip * Vec::tile_rows;
        gemm::with_rows(rows - i, [&](auto r) SENTFAST_INLINE {
          for (int64_t inside = 0; inside < here.width; inside += kTileColumns) {
            tile<decltype(r)::value>(p, here, a.data + i * a.stride, a.stride, b.row_begin + i, inside, panel);
          }
        });
      }
    }
  }
}

}  // namespace product
