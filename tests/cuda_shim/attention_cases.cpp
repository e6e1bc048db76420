// The tensor core's stand-in against the layouts of the PTX ISA, and attention of packed sequences against plain loops.
#include <algorithm>
#include <memory>

#include "arrays.h"
#include "attention.cuh"

namespace driver {
namespace {

using namespace sentfast;

template <typename T>
double value_of(T x) {
  return static_cast<double>(to_float(x));
}

// ---- the tensor core

template <typename T>
struct WarpArguments {
  // Row major: 16 x 16, 16 x 8, 16 x 8.
  const T* a;
  const T* b;
  float* sum;
  // Four matrices of 8 x 8, one after the other; what each lane loads of them, as it is and turned over.
  const T* matrices;
  T* loaded;
  T* turned;
};

// Every element where the ISA's tables have it: by group and thread in the group, without what the kernels share.
template <typename T>
__global__ void warp_kernel(const WarpArguments<T> p) {
  const int lane = static_cast<int>(threadIdx.x), group = lane >> 2, thread = lane & 3;
  uint32_t a[4], b[2];
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8, column = thread * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    memcpy(reinterpret_cast<char*>(a) + 2 * i, &p.a[16 * row + column], 2);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = thread * 2 + (i & 1) + (i >= 2 ? 8 : 0);
    memcpy(reinterpret_cast<char*>(b) + 2 * i, &p.b[8 * row + group], 2);
  }
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = p.sum[8 * (i < 2 ? group : group + 8) + thread * 2 + (i & 1)];
  multiply<T>(sum, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) p.sum[8 * (i < 2 ? group : group + 8) + thread * 2 + (i & 1)] = sum[i];

  __shared__ struct alignas(16) {
    T rows[32][8];
  } shared;
  copy_async(shared.rows[lane], p.matrices + 8 * lane, true);
  copy_wait();
  __syncthreads();
  uint32_t part[4];
  load_matrices(shared.rows[lane], part);
  memcpy(p.loaded + 8 * lane, part, 16);
  load_transposed(shared.rows[lane], part);
  memcpy(p.turned + 8 * lane, part, 16);
}

template <typename T>
void test_tensor_core(Dtype dtype) {
  ++cases;
  Array a(dtype, {16, 16}), b(dtype, {16, 8}), sum(Dtype::kFloat, {16, 8}), matrices(dtype, {4, 8, 8});
  Array loaded(dtype, {32, 4, 2}), turned(dtype, {32, 4, 2});
  for (Array* x : {&a, &b, &sum, &matrices}) x->fill_random();
  std::vector<double> want;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double total = sum.get({row, column});
      for (int k = 0; k < 16; ++k) total += a.get({row, k}) * b.get({k, column});
      want.push_back(total);
    }
  }
  const WarpArguments<T> p{static_cast<const T*>(a.data()), static_cast<const T*>(b.data()),
                           static_cast<float*>(sum.data()), static_cast<const T*>(matrices.data()),
                           static_cast<T*>(loaded.data()),  static_cast<T*>(turned.data())};
  expect_success("tensor core", launch(warp_kernel<T>, 1, 1, nullptr, p, 32));
  expect_near("product", sum, want, 16.0);
  for (int64_t lane = 0; lane < 32; ++lane) {
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t at = (lane * 4 + i) * 2 + j;
        const double plain = matrices.get({i, lane / 4, lane % 4 * 2 + j});
        const double below = matrices.get({i, lane % 4 * 2 + j, lane / 4});
        expect(loaded[at] == plain, "matrix", loaded[at], plain, at);
        expect(turned[at] == below, "matrix turned over", turned[at], below, at);
      }
    }
  }
}

// ---- attention

struct Problem {
  std::vector<int64_t> lengths;
  int64_t heads, dim;
  bool bias;
  // kContiguous: [T, heads, d] each. kWideRows: three views of one [T, 3, heads, d].
  Layout layout = Layout::kContiguous;
  int64_t max_seqlen = -1;
  double scale = 0.125;
  // A number that stands in one key of the first sequence.
  double odd = 0;
};

struct Expected {
  std::vector<double> out, lse;
  // What the results were made of.
  double size;
};

// Parts as [tokens][heads][dim], q, k and v.
Expected exactly(const Problem& problem, const std::vector<double> (&parts)[3], const std::vector<double>& bias,
                 int64_t reach, int64_t tokens) {
  const int64_t heads = problem.heads, dim = problem.dim;
  Expected found{std::vector<double>(tokens * heads * dim), std::vector<double>(heads * tokens), 1};
  int64_t first = 0;
  for (const int64_t length : problem.lengths) {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t i = 0; i < length; ++i) {
        std::vector<double> score(length);
        double top = -INFINITY, total = 0;
        bool nan = false;
        for (int64_t j = 0; j < length; ++j) {
          for (int64_t d = 0; d < dim; ++d) {
            score[j] +=
                parts[0][((first + i) * heads + head) * dim + d] * parts[1][((first + j) * heads + head) * dim + d];
          }
          score[j] *= problem.scale;
          if (problem.bias) score[j] += bias[head * (2 * reach - 1) + reach - 1 + j - i];
          nan = nan || isnan(score[j]);
          top = std::max(top, score[j]);
        }
        for (double& s : score) total += s = exp(s - top);
        double* out = &found.out[((first + i) * heads + head) * dim];
        for (int64_t j = 0; j < length; ++j) {
          for (int64_t d = 0; d < dim; ++d) {
            out[d] += score[j] / total * parts[2][((first + j) * heads + head) * dim + d];
          }
        }
        found.lse[head * tokens + first + i] = nan ? NAN : top + log(total);
      }
    }
    first += length;
  }
  return found;
}

void test_problem(const Problem& problem, Dtype dtype) {
  ++cases;
  const int64_t heads = problem.heads, dim = problem.dim;
  int64_t tokens = 0, longest = 0;
  std::string name = std::string("attention ") + name_of(dtype) + " " + std::to_string(dim) + " of";
  std::vector<int32_t> ends = {0};
  for (const int64_t length : problem.lengths) {
    tokens += length;
    longest = std::max(longest, length);
    ends.push_back(static_cast<int32_t>(tokens));
    name += " " + std::to_string(length);
  }
  name += problem.bias ? ", bias" : "";
  const bool packed = problem.layout == Layout::kWideRows;
  std::vector<std::unique_ptr<Array>> arrays;
  for (int i = 0; i < (packed ? 1 : 3); ++i) {
    arrays.push_back(std::make_unique<Array>(
        dtype, packed ? std::vector<int64_t>{tokens, 3 * heads, dim} : std::vector<int64_t>{tokens, heads, dim},
        problem.layout));
    arrays.back()->fill_random();
    if (problem.odd != 0 && tokens > 1) {
      for (int64_t head = 0; head < heads; ++head)
        arrays.back()->set({1, packed ? heads + head : head, 3}, problem.odd);
    }
  }
  const int64_t reach = longest + random_int(0, 2);
  Array table(Dtype::kFloat, {heads, 2 * reach - 1});
  table.fill_random();
  std::vector<double> parts[3], bias;
  for (int part = 0; part < 3; ++part) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t d = 0; d < dim; ++d) {
          parts[part].push_back(packed ? arrays[0]->get({t, part * heads + head, d}) : arrays[part]->get({t, head, d}));
        }
      }
    }
  }
  for (int64_t i = 0; i < table.count(); ++i) bias.push_back(table[i]);
  // One element more than belongs to the tensor is seen by the sanitizer.
  Array out(dtype, {tokens, heads, dim}), lse(Dtype::kFloat, {heads, tokens});
  AttentionArguments p{};
  const void** data[3] = {&p.q, &p.k, &p.v};
  int64_t* strides[3] = {p.q_stride, p.k_stride, p.v_stride};
  for (int part = 0; part < 3; ++part) {
    const Array& x = *arrays[packed ? 0 : part];
    *data[part] = static_cast<const char*>(x.data()) + (packed ? part * heads * x.stride[1] * 2 : 0);
    strides[part][0] = x.stride[0];
    strides[part][1] = x.stride[1];
  }
  p.cu_seqlens = ends.data();
  p.cu_seqlens_stride = 1;
  p.bias = problem.bias ? static_cast<const float*>(table.data()) : nullptr;
  p.reach = reach;
  p.out = out.data();
  p.lse = static_cast<float*>(lse.data());
  p.tokens = tokens;
  p.heads = heads;
  p.sequences = static_cast<int64_t>(problem.lengths.size());
  p.max_seqlen = problem.max_seqlen < 0 ? longest : problem.max_seqlen;
  p.scale = static_cast<float>(problem.scale);
  expect_success(name, run_attention(dtype, dim, p, nullptr));

  Expected want = exactly(problem, parts, bias, reach, tokens);
  // Weights are rounded to the dtype before they meet the values, and there are rounding errors of each: of numbers up
  // to 2 in the sum, two units in the last place of the dtype.
  const double unit = dtype == Dtype::kHalf ? 1.0 / 2048 : 1.0 / 256;
  for (int64_t i = 0; i < out.count(); ++i) {
    const double exact = want.out[i];
    expect(isnan(exact) ? isnan(out[i]) : fabs(out[i] - exact) <= 4 * unit, name + " out", out[i], exact, i);
  }
  for (int64_t i = 0; i < lse.count(); ++i) {
    const double exact = want.lse[i];
    expect(isnan(exact) ? isnan(lse[i]) : fabs(lse[i] - exact) <= 2e-5 * (4 + fabs(exact)), name + " lse", lse[i],
           exact, i);
  }
}

// Queries that have a block are NaN where a sequence is longer than the launch reckons with; nothing else is touched.
void test_stale_length() {
  ++cases;
  const Dtype dtype = Dtype::kHalf;
  Array x(dtype, {140, 1, 32}), out(dtype, {140, 1, 32}), lse(Dtype::kFloat, {1, 140});
  x.fill_random();
  const std::vector<int32_t> ends = {0, 130, 140};
  AttentionArguments p{};
  p.q = p.k = p.v = x.data();
  for (int64_t* stride : {p.q_stride, p.k_stride, p.v_stride}) stride[0] = stride[1] = 32;
  p.cu_seqlens = ends.data();
  p.cu_seqlens_stride = 1;
  p.out = out.data();
  p.lse = static_cast<float*>(lse.data());
  p.tokens = 140;
  p.heads = 1;
  p.sequences = 2;
  p.max_seqlen = 64;
  p.scale = 0.125f;
  // The rest would be NaN anyway.
  for (int64_t t = 0; t < 140; ++t) {
    lse.set({0, t}, 7);
    for (int64_t d = 0; d < 32; ++d) out.set({t, 0, d}, 7);
  }
  expect_success("stale length", run_attention(dtype, 32, p, nullptr));
  for (int64_t t = 0; t < 140; ++t) {
    const double number = lse[t];
    expect(t < 64 ? isnan(number) : (t < 130) == (number == 7), "stale length, lse", number, 7, t);
    for (int64_t d = 0; d < 32; ++d) {
      const double value = out[t * 32 + d];
      expect(t < 64 ? isnan(value) : t >= 130 || value == 7, "stale length, out", value, 7, t);
      expect(t < 130 || fabs(value) <= 2, "beside a stale length, out", value, 0, t);
    }
  }
}

// The bits of a result do not depend on the size of its block, which the longest sequence decides.
void test_blocks_agree() {
  ++cases;
  const Dtype dtype = Dtype::kBFloat16;
  Array x(dtype, {100, 3, 64}), one(dtype, {100, 1, 64}), other(dtype, {100, 1, 64});
  Array lse(Dtype::kFloat, {1, 100});
  x.fill_random();
  const std::vector<int32_t> ends = {0, 100};
  AttentionArguments p{};
  p.q = x.data();
  p.k = static_cast<const char*>(x.data()) + 2 * 64;
  p.v = static_cast<const char*>(x.data()) + 2 * 128;
  for (int64_t* stride : {p.q_stride, p.k_stride, p.v_stride}) {
    stride[0] = 192;
    stride[1] = 64;
  }
  p.cu_seqlens = ends.data();
  p.cu_seqlens_stride = 1;
  p.lse = static_cast<float*>(lse.data());
  p.tokens = 100;
  p.heads = p.sequences = 1;
  p.scale = 0.3f;
  for (Array* out : {&one, &other}) {
    p.out = out->data();
    p.max_seqlen = out == &one ? 100 : 200;
    expect_success("blocks", run_attention(dtype, 64, p, nullptr));
  }
  for (int64_t i = 0; i < one.count(); ++i) expect(one[i] == other[i], "blocks agree", one[i], other[i], i);
}

}  // namespace

void test_attention() {
  test_tensor_core<__half>(Dtype::kHalf);
  test_tensor_core<__nv_bfloat16>(Dtype::kBFloat16);
  const Layout wide = Layout::kWideRows;
  const std::vector<Problem> problems = {
      {{}, 2, 32, false},
      {{0, 0}, 1, 64, true},
      {{0, 1, 0, 15, 16, 17}, 2, 32, true},
      {{1, 15, 0, 17, 63}, 1, 64, false},
      {{63, 64, 65, 0}, 1, 32, false, wide},
      {{64, 65, 1}, 1, 64, true, wide},
      {{3, 129}, 1, 64, true},
      {{130, 7}, 1, 32, false, Layout::kContiguous, 512},
      {{40, 9}, 1, 64, false, wide, -1, -2.0},
      {{66, 5}, 1, 32, true, Layout::kContiguous, -1, 0.125, NAN},
  };
  int turn = 0;
  for (const Problem& problem : problems) {
    test_problem(problem, turn++ % 2 ? Dtype::kHalf : Dtype::kBFloat16);
    if (problem.lengths.size() > 2) test_problem(problem, turn % 2 ? Dtype::kHalf : Dtype::kBFloat16);
  }
  test_problem({{511}, 1, 64, false}, Dtype::kHalf);
  test_problem({{512, 1}, 1, 32, true, wide}, Dtype::kBFloat16);
  test_stale_length();
  test_blocks_agree();
}

}  // namespace driver
