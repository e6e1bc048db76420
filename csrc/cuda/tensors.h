// From PyTorch's tensors to what the kernels take. Uses the stable ABI of PyTorch 2.10 only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "rows.cuh"

namespace sentfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const char* name, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  ": expected float32, bfloat16 or float16, got ", type);
  return type == ScalarType::Float ? Dtype::kFloat : (type == ScalarType::Half ? Dtype::kHalf : Dtype::kBFloat16);
}

inline void check_type(const char* name, const Tensor& x, ScalarType expected) {
  STD_TORCH_CHECK(x.scalar_type() == expected, name, ": expected ", expected, ", got ", x.scalar_type());
}

inline void check_dim(const char* name, const Tensor& x, int64_t expected) {
  STD_TORCH_CHECK(x.dim() == expected, name, ": expected ", expected, " dimensions, got ", x.dim());
}

inline void check_size(const char* name, const Tensor& x, int64_t dim, int64_t expected) {
  STD_TORCH_CHECK(x.size(dim) == expected, name, ": expected size ", expected, " in dimension ", dim, ", got ",
                  x.size(dim));
}

inline void check_device(const char* name, const Tensor& x, const Tensor& first) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == first.get_device_index(), name,
                  ": expected a tensor on CUDA device ", first.get_device_index());
}

// The leading `dims` dimensions of x are those of first.
inline void check_leading(const char* name, const Tensor& x, const Tensor& first, int64_t dims) {
  for (int64_t d = 0; d < dims; ++d) check_size(name, x, d, first.size(d));
}

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& size, ScalarType type) {
  return torch::stable::new_empty(like, size, type);
}

inline std::vector<int64_t> leading(const Tensor& x, int64_t dims) {
  std::vector<int64_t> size(dims);
  for (int64_t d = 0; d < dims; ++d) size[d] = x.size(d);
  return size;
}

// Makes the device of a tensor the current one for as long as it lives; knows that device's current stream.
class Device {
 public:
  explicit Device(const Tensor& x) : guard_(x.get_device_index()) {
    // This library carries a CUDA runtime of its own, which must agree with PyTorch's on the device.
    check(cudaSetDevice(x.get_device_index()));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA error in sentfast: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// The leading dimensions of the tensors as rows. A tensor whose dimensions do not fit is replaced by a copy.
template <int kTensors>
inline Rows<kTensors> rows_of(int64_t dims, Tensor* const (&tensors)[kTensors]) {
  Rows<kTensors> rows;
  for (int attempt = 0;; ++attempt) {
    const int64_t* stride[kTensors];
    for (int t = 0; t < kTensors; ++t) stride[t] = tensors[t]->strides().data();
    if (collapse<kTensors>(static_cast<int>(dims), tensors[0]->sizes().data(), stride, rows)) return rows;
    STD_TORCH_CHECK(attempt == 0, "sentfast: leading dimensions do not collapse");
    for (int t = 0; t < kTensors; ++t) *tensors[t] = torch::stable::contiguous(*tensors[t]);
  }
}

}  // namespace
}  // namespace sentfast
