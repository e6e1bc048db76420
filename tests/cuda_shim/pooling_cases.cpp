// pool and pool_backward against plain loops in double.
#include <algorithm>

#include "arrays.h"
#include "pooling.cuh"
#include "pooling_backward.cuh"

namespace driver {
namespace {

using namespace sentfast;

struct Case {
  Dtype dtype = Dtype::kFloat;
  Layout layout = Layout::kContiguous;
  std::vector<int32_t> modes = {kMean};
  int64_t dim = 5;
  int64_t prompt_length = 0;
  bool normalize = false;
  // Padded: the mask ([batch * length], empty: none) in integers of mask_bytes, transposed or not.
  int64_t batch = 1, length = 1;
  std::vector<int> mask;
  int mask_bytes = 1;
  bool mask_transposed = false;
  // Packed: where not empty.
  std::vector<int32_t> cu_seqlens;

  bool packed() const { return !cu_seqlens.empty(); }
  int64_t sequences() const { return packed() ? static_cast<int64_t>(cu_seqlens.size()) - 1 : batch; }
  std::string name() const {
    std::string text = std::string("pool ") + name_of(dtype) + " D" + std::to_string(dim) + " layout" +
                       std::to_string(static_cast<int>(layout)) + (packed() ? " packed" : " padded") + " L" +
                       std::to_string(length) + " prompt" + std::to_string(prompt_length) +
                       (normalize ? " normalize" : "") + " mask" + std::to_string(mask.empty() ? 0 : mask_bytes) +
                       " modes";
    for (const int32_t mode : modes) text += " " + std::to_string(mode);
    return text;
  }
};

// Which positions of a sequence are used, and the special ones, found by walking along it.
struct Walk {
  int64_t origin = 0, shift = 0, first = -1, last = -1;
  std::vector<int64_t> used;
};

Walk walk(const Case& c, int64_t b) {
  Walk w;
  int64_t length = c.length;
  w.origin = b * c.length;
  if (c.packed()) {
    const auto clamp = [&](int32_t v) { return std::min<int64_t>(std::max<int64_t>(v, 0), c.length); };
    w.origin = clamp(c.cu_seqlens[b]);
    length = std::max<int64_t>(0, clamp(c.cu_seqlens[b + 1]) - w.origin);
  }
  const auto token = [&](int64_t t) { return c.mask.empty() || c.mask[b * c.length + t] != 0; };
  while (w.shift < length && !token(w.shift)) ++w.shift;
  if (w.shift == length) w.shift = 0;
  for (int64_t t = w.shift; t < length; ++t) {
    if (token(t) && t - w.shift >= c.prompt_length) w.used.push_back(t);
  }
  if (length > 0) w.first = w.used.empty() ? 0 : w.used.front();
  if (!w.used.empty()) w.last = w.used.back();
  if (c.packed()) w.last = length - 1;
  return w;
}

double denominator(int32_t mode, const Walk& w) {
  double total = 0;
  for (const int64_t t : w.used) total += mode == kWeightedMean ? static_cast<double>(t - w.shift + 1) : 1;
  total = std::max(total, 1e-9);
  return mode == kMeanSqrtLenTokens ? sqrt(total) : total;
}

// One element of the pooled result before normalisation; `index` is set for max.
template <typename Value>
double pooled(int32_t mode, const Walk& w, Value x, int64_t* index) {
  if (mode == kCls) return w.first < 0 ? 0 : x(w.first);
  if (mode == kLastToken) return w.last < 0 ? 0 : x(w.last);
  if (mode == kMax) {
    double top = -INFINITY;
    *index = -1;
    for (const int64_t t : w.used) {
      const double v = x(t);
      if (*index < 0 || v > top || (isnan(v) && !isnan(top))) {
        top = v;
        *index = t;
      }
    }
    return top;
  }
  double sum = 0;
  for (const int64_t t : w.used) sum += x(t) * (mode == kWeightedMean ? static_cast<double>(t - w.shift + 1) : 1);
  return sum / denominator(mode, w);
}

class PoolTest {
 public:
  explicit PoolTest(const Case& c)
      : c_(c),
        name_(c.name()),
        batch_(c.sequences()),
        modes_(static_cast<int64_t>(c.modes.size())),
        columns_(modes_ * c.dim),
        x_(c.dtype, shape(), c.layout),
        cu_(batch_ * 2 * 4 + 8),
        mask_(static_cast<int64_t>(c.mask.size()) * c.mask_bytes),
        out_(c.dtype, {batch_, columns_}),
        norm_(Dtype::kFloat, {batch_}),
        argmax_(batch_ * c.dim * 4) {
    ++cases;
    for (int64_t b = 0; b < batch_; ++b) walks_.push_back(walk(c, b));
    fill_x();
    fill_indices();
  }

  void run() {
    forward();
    backward();
  }

  // A NaN in a token, to be found by max and kept by the means.
  void plant_nan() {
    for (const Walk& w : walks_) {
      if (!w.used.empty()) x_.set(index(w, w.used[w.used.size() / 2], c_.dim / 2), NAN);
    }
  }

 private:
  const Case& c_;
  std::string name_;
  int64_t batch_, modes_, columns_;
  Array x_;
  Buffer cu_, mask_;
  Array out_, norm_;
  Buffer argmax_;
  std::vector<Walk> walks_;
  Batch kernel_batch_{};

  std::vector<int64_t> shape() const {
    if (c_.packed()) return {c_.length, c_.dim};
    return {c_.batch, c_.length, c_.dim};
  }
  std::vector<int64_t> index(const Walk& w, int64_t t, int64_t column) const {
    if (c_.packed()) return {w.origin + t, column};
    return {w.origin / std::max<int64_t>(c_.length, 1), t, column};
  }
  // Padding stays NaN: nothing may read it.
  void fill_x() {
    for (const Walk& w : walks_) {
      std::vector<int64_t> rows = w.used;
      if (c_.packed() && w.last >= 0) rows.push_back(w.last);
      if (c_.packed() && w.first >= 0) rows.push_back(w.first);
      for (const int64_t t : rows) {
        for (int64_t d = 0; d < c_.dim; ++d) x_.set(index(w, t, d), random_value());
      }
    }
  }
  // cu_seqlens with a stride of 2, the mask in its integer type; non-zero is not always 1.
  void fill_indices() {
    kernel_batch_.batch = batch_;
    kernel_batch_.length = c_.length;
    kernel_batch_.prompt_length = std::min(c_.prompt_length, c_.length);
    if (c_.packed()) {
      int32_t* cu = reinterpret_cast<int32_t*>(cu_.data());
      for (int64_t b = 0; b <= batch_; ++b) cu[2 * b] = c_.cu_seqlens[b];
      kernel_batch_.cu_seqlens = cu;
      kernel_batch_.cu_seqlens_stride = 2;
    } else if (!c_.mask.empty()) {
      kernel_batch_.mask_bytes = c_.mask_bytes;
      kernel_batch_.mask_stride[0] = c_.mask_transposed ? 1 : c_.length;
      kernel_batch_.mask_stride[1] = c_.mask_transposed ? c_.batch : 1;
      for (int64_t b = 0; b < c_.batch; ++b) {
        for (int64_t t = 0; t < c_.length; ++t) {
          // The highest byte: a kernel that reads only the lowest one would miss it.
          const int64_t place = b * kernel_batch_.mask_stride[0] + t * kernel_batch_.mask_stride[1];
          memset(mask_.data() + place * c_.mask_bytes, 0, c_.mask_bytes);
          if (c_.mask[b * c_.length + t] != 0) mask_.data()[(place + 1) * c_.mask_bytes - 1] = t % 2 ? 1 : 2;
        }
      }
      kernel_batch_.attention_mask = mask_.data();
    }
  }
  Modes modes() const {
    Modes m{static_cast<int>(modes_), {}};
    for (int64_t i = 0; i < modes_; ++i) m.mode[i] = c_.modes[i];
    return m;
  }
  bool has_max() const { return modes().has(kMax); }

  void forward() {
    Array scratch(Dtype::kFloat, {batch_, columns_});
    PoolArguments a{};
    a.batch = kernel_batch_;
    a.modes = modes();
    a.dim = c_.dim;
    a.x = x_.data();
    a.x_stride[0] = c_.packed() ? 0 : x_.stride[0];
    a.x_stride[1] = x_.stride[c_.packed() ? 0 : 1];
    a.x_stride[2] = x_.stride[c_.packed() ? 1 : 2];
    a.out = c_.normalize && c_.dtype != Dtype::kFloat ? scratch.data() : out_.data();
    a.out_is_float = c_.normalize;
    a.argmax = has_max() ? reinterpret_cast<int32_t*>(argmax_.data()) : nullptr;
    float* norm = c_.normalize ? static_cast<float*>(norm_.data()) : nullptr;
    expect_success(name_, run_pool(c_.dtype, a, out_.data(), norm, nullptr));

    std::vector<double> want, norms;
    for (const Walk& w : walks_) {
      std::vector<double> row(columns_);
      double squares = 0;
      for (int64_t i = 0; i < columns_; ++i) {
        int64_t at = -2;
        const auto x = [&](int64_t t) { return x_.get(index(w, t, i % c_.dim)); };
        row[i] = pooled(c_.modes[i / c_.dim], w, x, &at);
        squares += row[i] * row[i];
        if (at != -2) {
          const int64_t place = (&w - walks_.data()) * c_.dim + i % c_.dim;
          const int64_t got = reinterpret_cast<int32_t*>(argmax_.data())[place];
          expect(got == at, name_ + " argmax", static_cast<double>(got), static_cast<double>(at), place);
        }
      }
      norms.push_back(sqrt(squares));
      for (const double v : row) want.push_back(c_.normalize ? v / std::max(norms.back(), 1e-12) : v);
      if (c_.normalize && isnan(norms.back())) std::fill(want.end() - columns_, want.end(), NAN);
    }
    expect_near(name_ + " out", out_, want);
    if (c_.normalize) expect_near(name_ + " norm", norm_, norms);
  }

  void backward() {
    Array grad(c_.dtype, {batch_, columns_}, c_.layout);
    grad.fill_random();
    Array grad_x(c_.dtype, shape());
    Buffer plans(batch_ * static_cast<int64_t>(sizeof(SequencePlan)));
    PoolBackwardArguments a{};
    a.batch = kernel_batch_;
    a.modes = modes();
    a.dim = c_.dim;
    a.grad = grad.data();
    if (c_.normalize) {
      a.out = out_.data();
      a.norm = static_cast<const float*>(norm_.data());
      a.norm_stride = 1;
    }
    for (int i = 0; i < 2; ++i) {
      a.grad_stride[i] = grad.stride[i];
      a.out_stride[i] = out_.stride[i];
    }
    a.argmax = has_max() ? reinterpret_cast<const int32_t*>(argmax_.data()) : nullptr;
    a.argmax_stride[0] = c_.dim;
    a.argmax_stride[1] = 1;
    if (needs_plans(!c_.mask.empty(), c_.normalize)) a.plans = reinterpret_cast<SequencePlan*>(plans.data());
    a.grad_x = grad_x.data();
    expect_success(name_, run_pool_backward(c_.dtype, a, nullptr));

    std::vector<double> want(grad_x.count(), 0);
    double scale = 1;
    for (int64_t b = 0; b < batch_; ++b) add_gradient(walks_[b], b, grad, want);
    for (const double v : want) scale = isfinite(v) ? std::max(scale, fabs(v)) : scale;
    expect_near(name_ + " grad_x", grad_x, want, scale);
  }

  void add_gradient(const Walk& w, int64_t b, const Array& grad, std::vector<double>& want) const {
    double along = 0;
    for (int64_t i = 0; i < columns_; ++i) along += grad.get({b, i}) * out_.get({b, i});
    for (int64_t i = 0; i < columns_; ++i) {
      const int32_t mode = c_.modes[i / c_.dim];
      double g = grad.get({b, i});
      if (c_.normalize) {
        const double norm = norm_.get({b});
        g = norm < 1e-12 ? g / 1e-12 : (g - out_.get({b, i}) * along) / norm;
      }
      const auto add = [&](int64_t t, double v) { want[(w.origin + t) * c_.dim + i % c_.dim] += v; };
      if (mode == kCls || mode == kLastToken) {
        const int64_t t = mode == kCls ? w.first : w.last;
        if (t >= 0) add(t, g);
      } else if (mode == kMax) {
        const int32_t t = reinterpret_cast<int32_t*>(argmax_.data())[b * c_.dim + i % c_.dim];
        // A wrong one has been reported; here it must not lead outside.
        if (t >= 0 && (w.origin + t) * c_.dim < static_cast<int64_t>(want.size())) add(t, g);
      } else {
        for (const int64_t t : w.used) {
          add(t, g * (mode == kWeightedMean ? static_cast<double>(t - w.shift + 1) : 1) / denominator(mode, w));
        }
      }
    }
  }
};

const std::vector<std::vector<int32_t>> kModeSets = {
    {kMean},
    {kMax},
    {kCls},
    {kWeightedMean, kLastToken},
    {kMeanSqrtLenTokens, kMean, kMean},
    {kMean, kMax, kCls, kLastToken, kWeightedMean, kMeanSqrtLenTokens}};

// All mask patterns that matter, for `length` positions: full, right and left padding, holes, empty, one token.
std::vector<int> patterns(int64_t length, int64_t* batch) {
  std::vector<int> mask;
  const auto add = [&](auto token) {
    for (int64_t t = 0; t < length; ++t) mask.push_back(token(t) ? 1 : 0);
  };
  add([&](int64_t) { return true; });
  add([&](int64_t t) { return t < length / 2; });
  add([&](int64_t t) { return t >= length / 3; });
  add([&](int64_t t) { return t % 3 == 1; });
  add([&](int64_t) { return false; });
  add([&](int64_t t) { return t == length - 1; });
  *batch = 6;
  return mask;
}

void test_padded(Dtype dtype) {
  int turn = 0;
  for (const int64_t length : {1, 19, 70}) {
    // Fibres are slow: the layouts of a middle length are seen in float32.
    if (length == 19 && dtype != Dtype::kFloat) continue;
    for (const auto& modes : kModeSets) {
      Case c;
      c.dtype = dtype;
      c.modes = modes;
      c.length = length;
      c.layout = kLayouts[turn % 4];
      // Several tiles of vectors once in a while.
      c.dim = turn % 12 == 0 ? 136 : std::vector<int64_t>{8, 24, 37}[turn % 3];
      c.mask_bytes = 1 << turn % 4;
      c.mask_transposed = turn % 5 == 0;
      c.prompt_length = turn % 4 == 3 ? 4 : 0;
      c.normalize = turn % 2 == 1;
      c.mask = patterns(length, &c.batch);
      PoolTest(c).run();
      c.mask.clear();
      c.batch = 1;
      PoolTest(c).run();
      ++turn;
    }
  }
}

void test_packed(Dtype dtype) {
  int turn = 0;
  const std::vector<std::vector<int32_t>> offsets = {
      {0, 3, 3, 40, 41, 110}, {0, 17}, {0, 0, 0}, {0, 5, 7, 9, 12, 12, 20, 33, 150}};
  for (const auto& cu_seqlens : offsets) {
    for (const auto& modes : kModeSets) {
      Case c;
      c.dtype = dtype;
      c.modes = modes;
      c.cu_seqlens = cu_seqlens;
      c.length = cu_seqlens.back();
      c.layout = kLayouts[turn % 4];
      c.dim = std::vector<int64_t>{16, 1, 40}[turn % 3];
      c.prompt_length = turn % 3 == 2 ? 3 : 0;
      c.normalize = turn % 2 == 0;
      PoolTest(c).run();
      ++turn;
    }
  }
}

// Offsets that lie outside the tensor or fall: nothing outside may be touched, and every gradient is written.
void test_bad_offsets() {
  for (const std::vector<int32_t>& bad :
       {std::vector<int32_t>{-5, 4, 1000}, {2, 6}, {0, 1 << 30}, {-2147483647, 2147483647}, {3, 3, 7, 8}}) {
    Case c;
    c.cu_seqlens = bad;
    c.length = 9;
    c.dim = 4;
    c.modes = {kMean, kMax, kCls, kLastToken};
    PoolTest(c).run();
  }
  // Falling offsets: the values are unspecified, the memory is not.
  const int64_t rows = 9, dim = 4;
  Array x(Dtype::kFloat, {rows, dim}), grad(Dtype::kFloat, {3, dim}), out(Dtype::kFloat, {3, dim});
  Array grad_x(Dtype::kFloat, {rows, dim});
  x.fill_random();
  grad.fill_random();
  Buffer cu(16);
  const int32_t falling[4] = {7, 2, 8, 1};
  memcpy(cu.data(), falling, 16);
  PoolArguments a{};
  a.batch.batch = 3;
  a.batch.length = rows;
  a.batch.cu_seqlens = reinterpret_cast<int32_t*>(cu.data());
  a.batch.cu_seqlens_stride = 1;
  a.modes = {1, {kMean}};
  a.dim = dim;
  a.x = x.data();
  a.x_stride[1] = dim;
  a.x_stride[2] = 1;
  a.out = out.data();
  expect_success("falling offsets", run_pool(Dtype::kFloat, a, nullptr, nullptr, nullptr));
  PoolBackwardArguments g{};
  g.batch = a.batch;
  g.modes = a.modes;
  g.dim = dim;
  g.grad = grad.data();
  g.grad_stride[0] = dim;
  g.grad_stride[1] = 1;
  g.grad_x = grad_x.data();
  expect_success("falling offsets", run_pool_backward(Dtype::kFloat, g, nullptr));
  for (int64_t i = 0; i < grad_x.count(); ++i) expect(!isnan(grad_x[i]), "falling offsets written", grad_x[i], 0, i);
}

void test_edges(Dtype dtype) {
  for (const int64_t length : {0, 5, 300}) {
    Case c;
    c.dtype = dtype;
    c.batch = 2;
    c.length = length;
    c.dim = 24;
    c.modes = kModeSets.back();
    c.prompt_length = length == 5 ? INT64_MAX : 0;
    PoolTest test(c);
    test.plant_nan();
    test.run();
    c.normalize = true;
    PoolTest normalized(c);
    if (length == 300) normalized.plant_nan();
    normalized.run();
  }
  Case none;
  none.dtype = dtype;
  none.batch = 0;
  PoolTest(none).run();
  none.batch = 3;
  none.dim = 0;
  none.normalize = true;
  PoolTest(none).run();
}

}  // namespace

void test_pooling() {
  for (const Dtype dtype : {Dtype::kFloat, Dtype::kBFloat16, Dtype::kHalf}) {
    test_padded(dtype);
    test_packed(dtype);
    test_edges(dtype);
  }
  test_bad_offsets();
}

}  // namespace driver
