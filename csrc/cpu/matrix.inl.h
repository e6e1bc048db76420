// c = a b^T by rectangles: b is packed into panels as wide as a tile, a is read in place, a tile of c stays in
// registers.
//
// The tile is tile_rows x tile_vectors vectors (6 x 64 in AVX-512: 24 accumulators, the four vectors of b and one
// broadcast of a). A panel holds one Word per step and column: a float32, or for bf16 dot products a pair of bf16.
// a needs packing only where its rows are not plain Words: another dtype, a stride, an odd number of bf16.
//
namespace matrix {

using gemm::Float32Step;

constexpr int kTileRows = Vec::tile_rows;
constexpr int kTileVectors = Vec::tile_vectors;
constexpr int kTileColumns = kTileVectors * Vec::lanes;

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float r;
  __builtin_memcpy(&r, &bits, 4);
  return r;
}
inline float to_float(Float16 x) {
  float lane[Vec::lanes];
  Vec::load(&x, 1).store(lane);
  return lane[0];
}

// The Word of step `step` of row `row`; elements beyond `depth` are zero.
template <class Step, class T>
uint32_t word_at(const Operand& m, int64_t row, int64_t step, int64_t depth) {
  const T* p = static_cast<const T*>(m.data) + row * m.stride_row + step * Step::depth * m.stride_column;
  uint32_t word = 0;
  if constexpr (Step::depth == 1) {
    const float x = to_float(*p);
    __builtin_memcpy(&word, &x, 4);
  } else {
    word = p->bits;
    if (step * 2 + 1 < depth) word |= static_cast<uint32_t>(p[m.stride_column].bits) << 16;
  }
  return word;
}

// Whether rows of T can be read as Words where they lie: no pair is cut in two, and none lies across two Words.
template <class Step, class T>
bool plain(const Operand& m, int64_t depth) {
  return sizeof(T) * Step::depth == 4 && m.stride_column == 1 && depth % Step::depth == 0 &&
         m.stride_row % Step::depth == 0 && reinterpret_cast<uintptr_t>(m.data) % sizeof(Word) == 0;
}

constexpr int64_t kSquare = 16;

// Copies at most kSquare lines of at most as many numbers, `stride` apart; with `turn` the lines become columns.
template <class T>
void copy_part(const T* from, int64_t stride, int64_t lines, int64_t numbers, Word* out, int64_t out_stride,
               bool turn) {
  each_vector(lines, [&](int64_t line, auto height) {
    each_vector(numbers, [&](int64_t at, auto width) SENTFAST_INLINE {
      Vec square[Vec::lanes];
#pragma GCC unroll 16
      for (int i = 0; i < Vec::lanes; ++i) {
        square[i] = i < height.count ? load(from + (line + i) * stride + at, width) : Vec::zero();
      }
      if (turn) Vec::transpose(square);
      auto* to = reinterpret_cast<AliasedFloat*>(turn ? out + at * out_stride + line : out + line * out_stride + at);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::lanes; ++i) {
        if (i >= (turn ? width.count : height.count)) break;
        turn ? store(square[i], to + i * out_stride, height) : store(square[i], to + i * out_stride, width);
      }
    });
  });
}

// The same of whole squares.
template <class T>
void copy_square(const T* from, int64_t stride, Word* out, int64_t out_stride, bool turn) {
  for (int64_t line = 0; line < kSquare; line += Vec::lanes) {
    for (int64_t at = 0; at < kSquare; at += Vec::lanes) {
      Vec square[Vec::lanes];
#pragma GCC unroll 16
      for (int i = 0; i < Vec::lanes; ++i) square[i] = Vec::load(from + (line + i) * stride + at);
      if (turn) Vec::transpose(square);
      Word* to = turn ? out + at * out_stride + line : out + line * out_stride + at;
#pragma GCC unroll 16
      for (int i = 0; i < Vec::lanes; ++i) square[i].store(reinterpret_cast<float*>(to + i * out_stride));
    }
  }
}

// Packs `count` rows: word (step, i) goes to out[step * out_step + i * out_row]; rows up to `padded` are zero.
// Pieces of kSquare x kSquare, so that neither side leaves the first cache, each in the order in which it lies in
// memory.
template <class Step, class T>
void pack(const Operand& m, int64_t row, int64_t count, int64_t padded, int64_t step_begin, int64_t step_end,
          int64_t depth, Word* out, int64_t out_step, int64_t out_row) {
  const bool words = plain<Step, T>(m, depth), across = m.stride_row < m.stride_column;
  const bool lines = Step::depth == 1 && (m.stride_column == 1 || m.stride_row == 1) && (out_row == 1 || out_step == 1);
  const auto piece = [&](int64_t s, int64_t s_stop, int64_t i, int64_t i_stop) {
    if (lines) {
      const T* from = static_cast<const T*>(m.data) + (row + i) * m.stride_row + s * m.stride_column;
      const bool by_rows = m.stride_column == 1, to_rows = out_step == 1;
      const int64_t stride = by_rows ? m.stride_row : m.stride_column, out_stride = to_rows ? out_row : out_step;
      Word* to = out + (s - step_begin) * out_step + i * out_row;
      const int64_t rows = i_stop - i, steps = s_stop - s;
      if (rows < kSquare || steps < kSquare) {
        copy_part(from, stride, by_rows ? rows : steps, by_rows ? steps : rows, to, out_stride, by_rows != to_rows);
        return;
      }
      if (!by_rows) {
        for (int64_t t = kSquare; t < 2 * kSquare; ++t) prefetch(from + t * stride);
      }
      copy_square(from, stride, to, out_stride, by_rows != to_rows);
    } else if (words) {
      for (int64_t r = i; r < i_stop; ++r) {
        const Word* from = reinterpret_cast<const Word*>(static_cast<const T*>(m.data) + (row + r) * m.stride_row);
        for (int64_t t = s; t < s_stop; ++t) out[(t - step_begin) * out_step + r * out_row] = from[t];
      }
    } else if (across) {
      const T* ahead =
          static_cast<const T*>(m.data) + (row + i) * m.stride_row + (s + kSquare) * Step::depth * m.stride_column;
      for (int64_t t = s; t < s_stop; ++t) {
        prefetch(ahead + (t - s) * Step::depth * m.stride_column);
        Word* to = out + (t - step_begin) * out_step;
        for (int64_t r = i; r < i_stop; ++r) to[r * out_row] = word_at<Step, T>(m, row + r, t, depth);
      }
    } else {
      for (int64_t r = i; r < i_stop; ++r) {
        Word* to = out + r * out_row;
        for (int64_t t = s; t < s_stop; ++t) to[(t - step_begin) * out_step] = word_at<Step, T>(m, row + r, t, depth);
      }
    }
  };
  for (int64_t s = step_begin; s < step_end; s += kSquare) {
    const int64_t s_stop = s + kSquare < step_end ? s + kSquare : step_end;
    for (int64_t i = 0; i < count; i += kSquare) piece(s, s_stop, i, i + kSquare < count ? i + kSquare : count);
    for (int64_t t = s; t < s_stop; ++t) {
      for (int64_t i = count; i < padded; ++i) out[(t - step_begin) * out_step + i * out_row] = 0;
    }
  }
}

// Rows of a as the tile reads them.
struct Lines {
  const Word* words;
  int64_t stride;
};

// One tile of c: `rows` rows by up to kTileColumns columns.
struct Tile {
  const Matrix& m;
  int64_t row, column, columns;
  bool accumulate, finish;  // add to what c holds; divide by the norms
  const float* scale_b;     // 1 / max(norm_b, eps) of the panel's columns
};

// Asks for the lines of c that a tile will write, so that they are there when its sums are done.
inline void prefetch_tile(const Tile& t, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* c = t.m.c + (t.row + i) * t.m.stride_c + t.column;
    for (int64_t j = 0; j < kTileColumns && j < t.columns; j += 16) __builtin_prefetch(c + j, 1, 3);
  }
}

// Asks for a share of the next rows of a, of which only a piece is read before the work moves far away.
inline void prefetch_rows(Lines next, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < kTileRows; ++i) {
    for (int64_t s = begin; s < end; s += 16) __builtin_prefetch(next.words + i * next.stride + s, 0, 2);
  }
}

// What is left of a tile's sums: added to c, scaled, or cut off at the last column.
template <int R>
void write_sums(const Tile& t, const Vec (&sum)[R][kTileVectors], bool scaled) {
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    float* c = t.m.c + (t.row + i) * t.m.stride_c + t.column;
    const Vec scale = Vec::fill(scaled ? 1.0f / at_least(t.m.norm_a[t.row + i], t.m.eps) : 1.0f);
#pragma GCC unroll 8
    for (int j = 0; j < kTileVectors; ++j) {
      const int64_t left = t.columns - j * Vec::lanes;
      if (left <= 0) break;
      Vec value = sum[i][j];
      float* to = c + j * Vec::lanes;
      const int n = left < Vec::lanes ? static_cast<int>(left) : Vec::lanes;
      if (t.accumulate) value = value + Vec::load(to, n);
      if (scaled) value = value * Vec::load(t.scale_b + j * Vec::lanes) * scale;
      n < Vec::lanes ? value.store(to, n) : value.store(to);
    }
  }
}

template <class Step, int R>
void tile(const Tile& t, Lines a, const Word* panel, int64_t steps) {
  Vec sum[R][kTileVectors];
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < kTileVectors; ++j) sum[i][j] = Vec::zero();
  }
  gemm::accumulate<Step, R, kTileVectors>(sum, a.words, a.stride, panel, kTileColumns, steps);
  const bool scaled = t.finish && t.m.norm_a != nullptr;
  if (t.accumulate || t.columns < kTileColumns) return write_sums<R>(t, sum, scaled);
  // Of narrow rows the writing takes longer than the sums, so whole tiles are written without a question in between.
  const int64_t stride = t.m.stride_c;
  float* c = t.m.c + t.row * stride + t.column;
  if (!scaled) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i, c += stride) {
#pragma GCC unroll 8
      for (int j = 0; j < kTileVectors; ++j) sum[i][j].store(c + j * Vec::lanes);
    }
    return;
  }
  const float *norm = t.m.norm_a + t.row, eps = t.m.eps;
  Vec scale_b[kTileVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kTileVectors; ++j) scale_b[j] = Vec::load(t.scale_b + j * Vec::lanes);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i, c += stride) {
    const Vec scale = Vec::fill(1.0f / at_least(norm[i], eps));
#pragma GCC unroll 8
    for (int j = 0; j < kTileVectors; ++j) (sum[i][j] * scale_b[j] * scale).store(c + j * Vec::lanes);
  }
}

template <class Step>
void tile_of(int64_t rows, const Tile& t, Lines a, const Word* panel, int64_t steps) {
  gemm::with_rows(rows, [&](auto r) SENTFAST_INLINE { tile<Step, decltype(r)::value>(t, a, panel, steps); });
}

// Scratch of one thread, cut into its parts.
struct Scratch {
  Word *b, *a;
  float* scale_b;

  explicit Scratch(void* memory) {
    const auto address = (reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64;
    b = reinterpret_cast<Word*>(address);
    a = b + kBlockColumns * kBlockDepth;
    scale_b = reinterpret_cast<float*>(a + kBlockRows * (kBlockDepth + 16));
  }
};

template <class Step, class A, class B>
void by_tiles(const Matrix& m, const Block& block, void* memory) {
  const Scratch scratch(memory);
  const int64_t steps = (m.depth + Step::depth - 1) / Step::depth;
  const bool a_in_place = plain<Step, A>(m.a, m.depth);
  for (int64_t column = block.column_begin; column < block.column_end; column += kBlockColumns) {
    const int64_t columns = block.column_end - column < kBlockColumns ? block.column_end - column : kBlockColumns;
    if (m.norm_b != nullptr) {
      for (int64_t j = 0; j < columns; ++j) scratch.scale_b[j] = 1.0f / at_least(m.norm_b[column + j], m.eps);
      fill(scratch.scale_b + columns, kBlockColumns - columns, 0.0f);
    }
    int64_t step = 0;
    do {  // also once for a depth of 0, which makes zeros
      const int64_t count = steps - step < kBlockDepth ? steps - step : kBlockDepth;
      for (int64_t j = 0; j < columns; j += kTileColumns) {
        const int64_t width = columns - j < kTileColumns ? columns - j : kTileColumns;
        pack<Step, B>(m.b, column + j, width, kTileColumns, step, step + count, m.depth, scratch.b + j * count,
                      kTileColumns, 1);
      }
      for (int64_t row = block.row_begin; row < block.row_end; row += kBlockRows) {
        const int64_t rows = block.row_end - row < kBlockRows ? block.row_end - row : kBlockRows;
        Lines lines;
        if (a_in_place) {
          const A* first = static_cast<const A*>(m.a.data) + row * m.a.stride_row;
          lines = {reinterpret_cast<const Word*>(first) + step, m.a.stride_row / Step::depth};
        } else {
          // Rows a power of two apart would share the same few places of the first cache.
          const int64_t stride = count + 16;
          pack<Step, A>(m.a, row, rows, rows, step, step + count, m.depth, scratch.a, 1, stride);
          lines = {scratch.a, stride};
        }
        for (int64_t i = 0; i < rows; i += kTileRows) {
          const int64_t height = rows - i < kTileRows ? rows - i : kTileRows;
          for (int64_t j = 0; j < columns; j += kTileColumns) {
            const Tile t = {
                m, row + i, column + j, columns - j, m.add || step > 0, step + count == steps, scratch.scale_b + j};
            const Lines strip = {lines.words + i * lines.stride, lines.stride};
            prefetch_tile(t, height);
            if (count < steps) {
              const Lines next = {strip.words + kTileRows * strip.stride, strip.stride};
              prefetch_rows(next, count * j / columns, count * (j + kTileColumns) / columns);
            }
            tile_of<Step>(height, t, strip, scratch.b + j * count, count);
          }
        }
      }
      step += count;
    } while (step < steps);
  }
}

// Few rows or few columns: dot products straight from memory, the long side once, in strips for the first cache.
template <class A, class B>
void by_rows(const Matrix& m, const Block& block) {
  constexpr int64_t kStrip = 4096;  // numbers
  const int64_t strip = m.depth < kStrip ? kStrip / (m.depth > 0 ? m.depth : 1) : 1;
  for (int64_t begin = block.column_begin; begin < block.column_end; begin += strip) {
    const int64_t end = block.column_end - begin < strip ? block.column_end : begin + strip;
    for (int64_t i = block.row_begin; i < block.row_end; ++i) {
      const A* a = static_cast<const A*>(m.a.data) + i * m.a.stride_row;
      const float scale_a = m.norm_a != nullptr ? 1.0f / at_least(m.norm_a[i], m.eps) : 1.0f;
      for (int64_t j = begin; j < end; ++j) {
        const B* b = static_cast<const B*>(m.b.data) + j * m.b.stride_row;
        float value = rows::dot(a, b, m.depth);
        if (m.norm_b != nullptr) value = value * scale_a * (1.0f / at_least(m.norm_b[j], m.eps));
        float& c = m.c[i * m.stride_c + j];
        c = m.add ? c + value : value;
      }
    }
  }
}

template <class Step, class A, class B>
void block(const Matrix& m, const Block& block, void* memory) {
  const bool few = (m.rows < m.columns ? m.rows : m.columns) <= few_rows(m.depth);
  if (few && m.a.stride_column == 1 && m.b.stride_column == 1) {
    by_rows<A, B>(m, block);
  } else {
    by_tiles<Step, A, B>(m, block, memory);
  }
}

// Floating-point operations of `rounds` rounds of independent multiply-adds, none of which touches memory.
template <class Step>
double peak(int64_t rounds) {
  constexpr int chains = 12;
  Vec sum[chains];
  for (int i = 0; i < chains; ++i) sum[i] = Vec::fill(static_cast<float>(i));
  Vec a = Vec::fill(0.5f), b = Vec::fill(0.25f);
  for (int64_t r = 0; r < rounds; ++r) {
    SENTFAST_UNKNOWN(a.v);
    SENTFAST_UNKNOWN(b.v);
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) sum[i] = Step::multiply_add(a, b, sum[i]);
  }
  for (int i = 1; i < chains; ++i) sum[0] = sum[0] + sum[i];
  float result = sum[0].sum();
  SENTFAST_UNKNOWN(result);
  return 2.0 * Vec::lanes * Step::depth * chains * static_cast<double>(rounds);
}

}  // namespace matrix
