// Small arrays of any dtype and strides for the shim's driver, and the comparison with what is expected.
#pragma once

#include <math.h>
#include <stdio.h>

#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common.cuh"

namespace driver {

using sentfast::Dtype;

inline std::mt19937 generator(7);
inline int64_t checks = 0, failures = 0, cases = 0;

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }
inline const char* name_of(Dtype dtype) {
  return dtype == Dtype::kFloat ? "float32" : (dtype == Dtype::kHalf ? "float16" : "bfloat16");
}

// Multiples of 1/8 in [-2, 2]: exact in every dtype, and often equal to one another.
inline double random_value() { return static_cast<double>(std::uniform_int_distribution<int>(-16, 16)(generator)) / 8; }
inline int64_t random_int(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// Exactly as many bytes as are used, so that a sanitizer sees the first one too many; filled with NaN in every dtype.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(bytes > 0 ? malloc(static_cast<size_t>(bytes)) : nullptr) {
    if (bytes > 0) memset(data_, 0xff, static_cast<size_t>(bytes));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_;
};

enum class Layout { kContiguous, kWideRows, kOffset, kTransposed };
constexpr Layout kLayouts[] = {Layout::kContiguous, Layout::kWideRows, Layout::kOffset, Layout::kTransposed};

class Array {
 public:
  Dtype dtype;
  std::vector<int64_t> size, stride;

  // kWideRows leaves an aligned gap behind each row, kOffset starts off a vector's alignment, kTransposed puts
  // the last dimension outermost.
  Array(Dtype dtype, const std::vector<int64_t>& size, Layout layout = Layout::kContiguous)
      : dtype(dtype),
        size(size),
        stride(size.size()),
        offset_(layout == Layout::kOffset ? 1 : 0),
        buffer_(lay_out(layout) * bytes_of(dtype)) {}

  void* data() const { return buffer_.data() + offset_ * bytes_of(dtype); }
  int64_t count() const {
    int64_t n = 1;
    for (const int64_t s : size) n *= s;
    return n;
  }
  double get(const std::vector<int64_t>& index) const { return read(at(index)); }
  void set(const std::vector<int64_t>& index, double value) { write(at(index), value); }
  double operator[](int64_t i) const { return read(at(unravel(i))); }
  void fill_random() {
    for (int64_t i = 0; i < count(); ++i) write(at(unravel(i)), random_value());
  }

 private:
  int64_t offset_;
  Buffer buffer_;

  int64_t lay_out(Layout layout) {
    const int dims = static_cast<int>(size.size());
    int64_t step = 1, span = 1 + offset_;
    std::vector<int> order;
    for (int d = dims - 1; d >= 0; --d) order.push_back(d);
    if (layout == Layout::kTransposed && dims > 0) {
      order.erase(order.begin());
      order.push_back(dims - 1);
    }
    for (const int d : order) {
      stride[d] = step;
      step *= size[d];
      if (layout == Layout::kWideRows && d == dims - 1) step = (step + 31) / 16 * 16;
    }
    for (int d = 0; d < dims; ++d) span += (size[d] - 1) * stride[d];
    return count() == 0 ? 0 : span;
  }
  std::vector<int64_t> unravel(int64_t i) const {
    std::vector<int64_t> index(size.size());
    for (int d = static_cast<int>(size.size()) - 1; d >= 0; --d) {
      index[d] = i % size[d];
      i /= size[d];
    }
    return index;
  }
  int64_t at(const std::vector<int64_t>& index) const {
    int64_t i = 0;
    for (size_t d = 0; d < size.size(); ++d) i += index[d] * stride[d];
    return i;
  }
  double read(int64_t i) const {
    if (dtype == Dtype::kFloat) return static_cast<const float*>(data())[i];
    if (dtype == Dtype::kHalf) return __half2float(static_cast<const __half*>(data())[i]);
    return __bfloat162float(static_cast<const __nv_bfloat16*>(data())[i]);
  }
  void write(int64_t i, double value) {
    const float v = static_cast<float>(value);
    if (dtype == Dtype::kFloat) {
      static_cast<float*>(data())[i] = v;
    } else if (dtype == Dtype::kHalf) {
      static_cast<__half*>(data())[i] = __float2half_rn(v);
    } else {
      static_cast<__nv_bfloat16*>(data())[i] = __float2bfloat16_rn(v);
    }
  }
};

// `scale` is the size of what was summed. float32 sums of some hundred terms, then one rounding to the dtype.
inline bool near(double got, double want, double scale, Dtype dtype) {
  if (isnan(want)) return isnan(got);
  if (dtype == Dtype::kHalf && fabs(want) >= 65520) want = copysign(INFINITY, want);
  if (isinf(want)) return got == want;
  const double rounding = dtype == Dtype::kFloat ? 0 : (dtype == Dtype::kHalf ? 1.0 / 2000 : 1.0 / 250);
  return fabs(got - want) <= 2e-5 * (scale + fabs(want)) + rounding * fabs(want) + (dtype == Dtype::kHalf ? 6e-8 : 0);
}

inline void expect(bool good, const std::string& what, double got, double want, int64_t index) {
  ++checks;
  if (good) return;
  if (++failures <= 20) {
    printf("FAILED %s [%lld]: got %.9g, expected %.9g\n", what.c_str(), static_cast<long long>(index), got, want);
  }
}

inline void expect_near(const std::string& what, const Array& got, const std::vector<double>& want,
                        double scale = 1.0) {
  if (got.count() != static_cast<int64_t>(want.size())) expect(false, what + " size", 0, 0, 0);
  for (int64_t i = 0; i < got.count(); ++i) {
    expect(near(got[i], want[i], scale, got.dtype), what, got[i], want[i], i);
  }
}

inline void expect_success(const std::string& what, cudaError_t error) {
  expect(error == cudaSuccess, what + " launch", error, 0, 0);
}

void test_conversions();
void test_pooling();
void test_similarity();
void test_matrix();
void test_attention();

}  // namespace driver
