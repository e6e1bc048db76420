// Dot products and cosines of every row of a with every row of b: a tiled product with float32 accumulation.
// Each score sums over the depth in order, whatever the tile, so it depends on its two rows alone.
#pragma once

#include "normalize.cuh"

namespace sentfast {
namespace {

// Threads of a block in each direction.
constexpr int kSide = 16;
// Elements of each operand that one thread moves in a step, and the depth of the step that follows.
constexpr int kPart = 4;
template <int kTile>
constexpr int kDepth = kPart * kThreads / kTile;
// Below that many large tiles a GPU is not filled, and small ones are used.
constexpr int64_t kEnoughTiles = 128;
constexpr int kLargeTile = 128;
constexpr int kSmallTile = 64;

// a or b: [..., rows, depth].
struct Operand {
  const void* data;
  Dtype dtype;
  int64_t rows;
  int64_t row_stride;
  int64_t depth_stride;
  // Whether neighbours in memory are rows, and whether they can be read in vectors.
  bool rows_adjoin;
  bool vector;
};

struct MatrixArguments {
  // The batch dimensions of a and b.
  Rows<2> batch;
  Operand a;
  Operand b;
  int64_t depth;
  // Whether the scores are divided by the norms, and these written.
  bool cosine;
  // Contiguous.
  float* scores;
  float* norm_a;
  float* norm_b;
  float eps;
  // Set by the launcher.
  int64_t tiles_a;
  int64_t tiles_b;
};

template <int kTile>
struct Panel {
  // Padded by one vector, so that the depths of a row lie in different banks.
  float value[kDepth<kTile>][kTile + 4];
};

// One thread's part in moving an operand's tile: kPart neighbours in memory, from (row, k) of the tile on.
template <int kTile>
struct Mover {
  int row;
  int k;
  // Rows of the operand from `row` on, as far as they matter.
  int rows_left;
  // The element that the next step starts with.
  int64_t at;
  float values[kPart];

  __device__ Mover(const Operand& o, int64_t offset, int64_t row0) {
    constexpr int kParts = kDepth<kTile> / kPart, kRowParts = kTile / kPart;
    const int thread = threadIdx.x;
    row = o.rows_adjoin ? thread % kRowParts * kPart : thread / kParts;
    k = o.rows_adjoin ? thread / kRowParts : thread % kParts * kPart;
    rows_left = static_cast<int>(larger(0, smaller(kPart, o.rows - row0 - row)));
    at = offset + (row0 + row) * o.row_stride + k * o.depth_stride;
  }

  // `depth_left` is the operand's depth from this step on. Outside the operand everything is 0.
  __device__ void read(const Operand& o, int64_t depth_left) {
    const int k_left = static_cast<int>(larger(0, smaller(kPart, depth_left - k)));
    const int inside = o.rows_adjoin ? (k_left > 0 ? rows_left : 0) : (rows_left > 0 ? k_left : 0);
    if (o.vector && inside == kPart) {
      if (o.dtype == Dtype::kFloat) {
        load(static_cast<const float*>(o.data) + at, values);
      } else if (o.dtype == Dtype::kBFloat16) {
        load(static_cast<const __nv_bfloat16*>(o.data) + at, values);
      } else {
        load(static_cast<const __half*>(o.data) + at, values);
      }
    } else {
      const int64_t stride = o.rows_adjoin ? o.row_stride : o.depth_stride;
#pragma unroll
      for (int i = 0; i < kPart; ++i) values[i] = i < inside ? load_any(o.data, o.dtype, at + i * stride) : 0.0f;
    }
    at += kDepth<kTile> * o.depth_stride;
  }

  // By the divisors of the tile's rows.
  __device__ void divide(const Operand& o, const float* divisor) {
#pragma unroll
    for (int i = 0; i < kPart; ++i) values[i] /= divisor[row + (o.rows_adjoin ? i : 0)];
  }

  __device__ void write(const Operand& o, Panel<kTile>& panel) const {
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      if (o.rows_adjoin) {
        panel.value[k][row + i] = values[i];
      } else {
        panel.value[k + i][row] = values[i];
      }
    }
  }
};

// Four neighbouring rows of a panel, for each group of 4 * kSide rows.
template <int kTile, int kMicro>
__device__ inline void fragment(const Panel<kTile>& panel, int k, int place, float (&values)[kMicro]) {
#pragma unroll
  for (int g = 0; g < kMicro; g += 4) {
    float part[4];
    load(&panel.value[k][g * kSide + place * 4], part);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[g + i] = part[i];
  }
}

template <int kTile, int kMicro>
__device__ inline void write_scores(const MatrixArguments& p, int64_t batch, int64_t row0, int64_t column0,
                                    const float (&sum)[kMicro][kMicro]) {
  const bool whole = p.b.rows % 4 == 0;
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    const int64_t row = row0 + i / 4 * 4 * kSide + threadIdx.x / kSide * 4 + i % 4;
    if (row >= p.a.rows) continue;
    float* scores = p.scores + (batch * p.a.rows + row) * p.b.rows;
#pragma unroll
    for (int g = 0; g < kMicro; g += 4) {
      const int64_t column = column0 + g * kSide + threadIdx.x % kSide * 4;
      const float part[4] = {sum[i][g], sum[i][g + 1], sum[i][g + 2], sum[i][g + 3]};
      if (whole && column < p.b.rows) {
        store(scores + column, part);
        continue;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (column + j < p.b.rows) scores[column + j] = part[j];
      }
    }
  }
}

enum class Products { kPlain, kCosines, kUnits };

// The products of a tile, over the whole depth. kCosines: and the squares of row threadIdx.x % kTile, of a and then b;
// kUnits: of the rows by their divisors.
template <int kTile, Products kOf, int kMicro>
__device__ inline void multiply_tile(const MatrixArguments& p, int64_t batch, int64_t row0, int64_t column0,
                                     Panel<kTile> (&panel_a)[2], Panel<kTile> (&panel_b)[2],
                                     const float (*divisor)[kTile], float (&sum)[kMicro][kMicro], float& squares) {
  int64_t offset[2];
  p.batch.offsets(batch, offset);
  Mover<kTile> a(p.a, offset[0], row0), b(p.b, offset[1], column0);
  const auto write = [&](int to) {
    if constexpr (kOf == Products::kUnits) {
      a.divide(p.a, divisor[0]);
      b.divide(p.b, divisor[1]);
    }
    a.write(p.a, panel_a[to]);
    b.write(p.b, panel_b[to]);
  };
  constexpr int kStep = kDepth<kTile>;
  int now = 0;
  a.read(p.a, p.depth);
  b.read(p.b, p.depth);
  // The tile before may still be reading.
  __syncthreads();
  write(0);
  __syncthreads();
  for (int64_t left = p.depth; left > 0; left -= kStep) {
    // The next step's loads run beneath this one's arithmetic.
    const bool more = left > kStep;
    if (more) {
      a.read(p.a, left - kStep);
      b.read(p.b, left - kStep);
    }
// Unrolled further, it spills registers.
#pragma unroll 2
    for (int k = 0; k < kStep; ++k) {
      float x[kMicro], y[kMicro];
      fragment(panel_a[now], k, threadIdx.x / kSide, x);
      fragment(panel_b[now], k, threadIdx.x % kSide, y);
#pragma unroll
      for (int i = 0; i < kMicro; ++i) {
#pragma unroll
        for (int j = 0; j < kMicro; ++j) sum[i][j] = fmaf(x[i], y[j], sum[i][j]);
      }
      if constexpr (kOf == Products::kCosines) {
        if (threadIdx.x < 2 * kTile) {
          const Panel<kTile>& panel = threadIdx.x < kTile ? panel_a[now] : panel_b[now];
          const float value = panel.value[k][threadIdx.x % kTile];
          squares = fmaf(value, value, squares);
        }
      }
    }
    if (more) write(1 - now);
    __syncthreads();
    now = 1 - now;
  }
}

// Norms of the tile's rows, and the divisors. Whether plain products by their divisors are not all cosines: a square or
// a product may have left float32's range.
template <int kTile>
__device__ inline bool finish_norms(const MatrixArguments& p, int64_t batch, int64_t row0, int64_t column0,
                                    float squares, const Panel<kTile>& panel_a, const Panel<kTile>& panel_b,
                                    float (&divisor)[2][kTile]) {
  const int which = threadIdx.x / kTile, row = threadIdx.x % kTile;
  int beyond = 0;
  // The tile before may still be reading.
  __syncthreads();
  if (which < 2) {
    const Panel<kTile>& panel = which == 0 ? panel_a : panel_b;
    // Of a depth of 1 the first panel still holds everything.
    const float norm = norm_of(&panel.value[0][row], p.depth, squares);
    divisor[which][row] = at_least(norm, p.eps);
    // Of a row of zeros too, which no register is left to tell from one whose squares have vanished.
    beyond = norm < 1e-15f && (which == 0 ? p.a.rows > row0 + row : p.b.rows > column0 + row);
    beyond |= norm > 1e19f;
    if (which == 0 && column0 == 0 && row0 + row < p.a.rows) p.norm_a[batch * p.a.rows + row0 + row] = norm;
    if (which == 1 && row0 == 0 && column0 + row < p.b.rows) p.norm_b[batch * p.b.rows + column0 + row] = norm;
  }
  return reduce_block(beyond, Sum()) != 0;  // also makes the divisors known to all
}

template <int kTile, int kMicro>
__device__ inline void divide_scores(float (&divisor)[2][kTile], float (&sum)[kMicro][kMicro]) {
  const int which = threadIdx.x / kTile, row = threadIdx.x % kTile;
  if (which < 2) divisor[which][row] = 1.0f / divisor[which][row];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    const float inverse_a = divisor[0][i / 4 * 4 * kSide + threadIdx.x / kSide * 4 + i % 4];
#pragma unroll
    for (int j = 0; j < kMicro; ++j) {
      sum[i][j] *= inverse_a;
      sum[i][j] *= divisor[1][j / 4 * 4 * kSide + threadIdx.x % kSide * 4 + j % 4];
    }
  }
}

template <int kTile, bool kCosines>
__device__ inline void matrix_tile(const MatrixArguments& p, int64_t batch, int64_t row0, int64_t column0) {
  constexpr int kMicro = kTile / kSide;
  __shared__ Panel<kTile> panel_a[2], panel_b[2];
  float sum[kMicro][kMicro] = {};
  float squares = 0.0f;
  if constexpr (kCosines) {
    __shared__ float divisor[2][kTile];
    multiply_tile<kTile, Products::kCosines>(p, batch, row0, column0, panel_a, panel_b, divisor, sum, squares);
    if (finish_norms(p, batch, row0, column0, squares, panel_a[0], panel_b[0], divisor)) {
#pragma unroll
      for (int i = 0; i < kMicro * kMicro; ++i) sum[i / kMicro][i % kMicro] = 0.0f;
      multiply_tile<kTile, Products::kUnits>(p, batch, row0, column0, panel_a, panel_b, divisor, sum, squares);
    } else {
      divide_scores(divisor, sum);
    }
  } else {
    multiply_tile<kTile, Products::kPlain>(p, batch, row0, column0, panel_a, panel_b, nullptr, sum, squares);
  }
  write_scores<kTile>(p, batch, row0, column0, sum);
}

template <int kTile, bool kCosines>
__global__ void __launch_bounds__(kThreads, kMinBlocks) matrix_kernel(const __grid_constant__ MatrixArguments p) {
  const int64_t tiles = p.tiles_a * p.tiles_b;
  // Neighbouring blocks walk along the operand with fewer tiles, so that the other one is read from memory once.
  const bool a_first = p.tiles_a < p.tiles_b;
  for (int64_t i = blockIdx.x; i < tiles * p.batch.count; i += gridDim.x) {
    const int64_t batch = i / tiles, tile = i - batch * tiles;
    const int64_t row = a_first ? tile % p.tiles_a : tile / p.tiles_b;
    const int64_t column = a_first ? tile / p.tiles_a : tile % p.tiles_b;
    matrix_tile<kTile, kCosines>(p, batch, row * kTile, column * kTile);
  }
}

inline Operand operand(const void* data, Dtype dtype, int64_t rows, int64_t row_stride, int64_t depth_stride, int dims,
                       const int64_t* batch_strides) {
  Operand o{data, dtype, rows, row_stride, depth_stride, row_stride == 1 && depth_stride != 1, false};
  const int64_t bytes = dtype == Dtype::kFloat ? 4 : 2;
  const int64_t other_stride[1] = {o.rows_adjoin ? depth_stride : row_stride};
  const int64_t unit = o.rows_adjoin ? row_stride : depth_stride;
  o.vector = vectors(data, bytes, unit, 16, 1, other_stride) && vectors(data, bytes, unit, 16, dims, batch_strides);
  return o;
}

template <int kTile>
cudaError_t launch_matrix(MatrixArguments p, cudaStream_t stream) {
  // At least one tile each way: the norms of a are due even where b has no rows.
  p.tiles_a = larger(1, ceil_divide(p.a.rows, kTile));
  p.tiles_b = larger(1, ceil_divide(p.b.rows, kTile));
  const int64_t blocks = p.batch.count * p.tiles_a * p.tiles_b;
  if (p.cosine) return launch(matrix_kernel<kTile, true>, blocks, 1, stream, p);
  return launch(matrix_kernel<kTile, false>, blocks, 1, stream, p);
}

// Fills p.scores, and the norms of cosines.
inline cudaError_t run_similarity_matrix(const MatrixArguments& p, cudaStream_t stream) {
  const bool scores = p.a.rows > 0 && p.b.rows > 0;
  const bool norms = p.cosine && (p.a.rows > 0 || p.b.rows > 0);
  if (p.batch.count == 0 || (!scores && !norms)) return cudaSuccess;
  const int64_t large = p.batch.count * ceil_divide(p.a.rows, kLargeTile) * ceil_divide(p.b.rows, kLargeTile);
  if (large >= kEnoughTiles && p.a.rows > kSmallTile && p.b.rows > kSmallTile) {
    return launch_matrix<kLargeTile>(p, stream);
  }
  return launch_matrix<kSmallTile>(p, stream);
}

}  // namespace
}  // namespace sentfast
