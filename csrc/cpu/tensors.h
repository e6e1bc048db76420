// Between PyTorch's stable tensors and the kernels: dtypes, outputs, rows.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "isa.h"

// Headers before PyTorch 2.12 have the plain form only.
#if defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define SENTFAST_TORCH_CALL STABLE_TORCH_ERROR_CODE_CHECK
#else
#define SENTFAST_TORCH_CALL TORCH_ERROR_CODE_CHECK
#endif

// Of PyTorch 2.11 and later, whatever the headers are of: null where the running PyTorch is older. Windows has no such
// symbols, so there it is never used.
#if defined(__APPLE__)
#define SENTFAST_IF_THERE __attribute__((weak_import))
#else
#define SENTFAST_IF_THERE __attribute__((weak))
#endif
#if !defined(_WIN32)
extern "C" SENTFAST_IF_THERE AOTITorchError torch_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);
#endif

namespace sentfast::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The pages of a new tensor this large are asked for in 2 MiB pieces.
constexpr int64_t kLargeBytes = int64_t{16} << 20;
// What training keeps takes a block of memory of its own if it is this large; PyTorch aligns its tensors alike.
constexpr int64_t kOwnBytes = int64_t{1} << 20;
constexpr int64_t kAlignment = 64;

inline Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::Float32;
    case ScalarType::BFloat16:
      return Dtype::BFloat16;
    case ScalarType::Half:
      return Dtype::Float16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

inline int dtype_index(const Tensor& x, const char* name) { return static_cast<int>(dtype_of(x, name)); }

// Asks for huge pages: first touches of a large new tensor cost more than writing it. Only advice, so errors are
// ignored.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline int64_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Long:
    case ScalarType::Double:
      return 8;
    default:
      STD_TORCH_CHECK(false, "no results of dtype number ", static_cast<int>(dtype));
  }
}

// How long a new tensor lives, which says where it lies.
//
// Kept: what training keeps until the gradient, and gradients. Memory of a plain malloc. PyTorch asks for aligned
// blocks, from which glibc cuts off the ends; small objects settle in them, and the block, once free, is too small for
// the next of the same size. A step of training then takes new memory for what it has just freed. PyTorch cannot resize
// such a tensor in place, nor any tensor that needs a gradient.
//
// Given: what a user gets of calls that sentence-transformers makes too, and results without a gradient. PyTorch's own
// memory, which the user may resize.
enum class Life { Given, Kept };

inline AtenTensorHandle empty(int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t bytes,
                              ScalarType dtype, Life life) {
  AtenTensorHandle handle = nullptr;
  const auto type = static_cast<int32_t>(dtype);
  const int32_t cpu = aoti_torch_device_type_cpu();
#if defined(_WIN32)
  const bool own = false;
#else
  const bool own = life == Life::Kept && bytes >= kOwnBytes && torch_from_blob != nullptr;
#endif
  if (!own) {
    SENTFAST_TORCH_CALL(aoti_torch_empty_strided(dims, sizes, strides, type, cpu, -1, &handle));
    return handle;
  }
#if !defined(_WIN32)
  void* block = std::malloc(static_cast<size_t>(bytes) + kAlignment);
  STD_TORCH_CHECK(block != nullptr, "no memory for ", bytes, " bytes");
  const uintptr_t data = (reinterpret_cast<uintptr_t>(block) + kAlignment - 1) / kAlignment * kAlignment;
  const auto release = [](void*, void* owned) { std::free(owned); };
  SENTFAST_TORCH_CALL(torch_from_blob(reinterpret_cast<void*>(data), dims, sizes, strides, 0, type, cpu, -1, &handle,
                                      aoti_torch_layout_strided(), nullptr, 0, release, block));
#endif
  return handle;
}

// a * b of two sizes, or an error: a tensor that holds a few numbers can be expanded to any size.
inline int64_t times(int64_t a, int64_t b) {
  int64_t product = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &product), "expected a size below 2^63, got ", a, " * ", b);
  return product;
}

// Refuses a tensor that would take 2^63 bytes or more if each element had its own: no loop could visit them.
inline void check_size(const Tensor& x) {
  int64_t bytes = static_cast<int64_t>(x.element_size());
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (x.size(i) == 0) return;
  }
  for (int64_t i = 0; i < x.dim(); ++i) bytes = times(bytes, x.size(i));
}

// A new contiguous CPU tensor, not initialised.
inline Tensor new_tensor(const int64_t* sizes, int64_t dims, ScalarType dtype, Life life) {
  constexpr int64_t most = 64;  // PyTorch's own limit
  STD_TORCH_CHECK(dims <= most, "expected at most ", most, " dimensions, got ", dims);
  int64_t strides[most], numel = 1;
  bool none = false;
  for (int64_t i = dims; i-- > 0;) {
    strides[i] = numel;
    numel = times(numel, sizes[i] > 0 ? sizes[i] : 1);
    none = none || sizes[i] == 0;
  }
  const int64_t bytes = none ? 0 : times(numel, element_bytes(dtype));
  Tensor result(empty(dims, sizes, strides, bytes, dtype, life));
  if (bytes >= kLargeBytes) advise_huge_pages(result.mutable_data_ptr(), bytes);
  // The tests ask for tensors full of NaN, so that an element that a kernel forgets is seen.
  static const bool fill = std::getenv("SENTFAST_TEST_FILL") != nullptr;
  const auto size = static_cast<size_t>(result.numel()) * result.element_size();
  if (fill && size > 0) std::memset(result.mutable_data_ptr(), 0xff, size);
  return result;
}

inline Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype, Life life = Life::Given) {
  return new_tensor(sizes.data(), static_cast<int64_t>(sizes.size()), dtype, life);
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype, Life life = Life::Given) {
  return new_tensor(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, life);
}

// `count` uninitialised numbers, or an error that says how many.
template <class T>
std::unique_ptr<T[]> new_array(int64_t count) {
  const int64_t bytes = times(count, static_cast<int64_t>(sizeof(T)));
  std::unique_ptr<T[]> found(new (std::nothrow) T[static_cast<size_t>(count)]);
  STD_TORCH_CHECK(found != nullptr, "no memory for ", bytes, " bytes");
  return found;
}

inline Tensor as(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

inline std::vector<int64_t> sizes_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

// x as rows of its last dimension, at one distance from each other; copied only where its strides do not allow that.
struct RowView {
  Tensor tensor;
  int64_t rows, dim, stride;

  explicit RowView(const Tensor& x) : tensor(x), rows(1), dim(x.size(x.dim() - 1)), stride(dim) {
    check_size(x);
    for (int64_t i = 0; i + 1 < x.dim(); ++i) rows = times(rows, x.size(i));
    if (rows > 0 && dim > 0 && !uniform()) {
      tensor = torch::stable::contiguous(x);
      uniform();
    }
  }
  Rows get() const { return {tensor.const_data_ptr(), stride}; }

 private:
  bool uniform() {
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    const int64_t last = tensor.dim() - 1;
    if (dim > 1 && strides[last] != 1) return false;
    int64_t step = -1;  // distance that the next dimension outwards must have; the innermost may have any
    for (int64_t i = last - 1; i >= 0; --i) {
      if (sizes[i] == 1) continue;
      if (step < 0) {
        stride = strides[i];
      } else if (strides[i] != step) {
        return false;
      }
      step = strides[i] * sizes[i];
    }
    return true;
  }
};

// int32 [B + 1] that rises from 0 to the number of tokens; contiguous, or it cannot be read.
inline void check_cu_seqlens(const Tensor& cu_seqlens, int64_t total) {
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 &&
                      cu_seqlens.is_cpu(),
                  "cu_seqlens: expected an int32 CPU tensor of shape [B + 1]");
  const auto* ends = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t batch = cu_seqlens.size(0) - 1;
  bool rising = ends[0] == 0 && ends[batch] == total;
  for (int64_t i = 0; i < batch; ++i) rising = rising && ends[i] <= ends[i + 1];
  STD_TORCH_CHECK(rising, "cu_seqlens: expected to rise from 0 to ", total, " (the number of tokens)");
}

// out[i] = the sum of `size` floats of each part, in the order of the parts, which lie `stride` apart.
inline void sum_parts(const float* parts, int64_t count, int64_t stride, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = 0.0f;
  for (int64_t part = 0; part < count; ++part) {
    for (int64_t i = 0; i < size; ++i) out[i] += parts[part * stride + i];
  }
}

// Items per task so that a task is worth handing to another thread.
inline int64_t grain(int64_t elements_per_item) {
  constexpr int64_t worthwhile = 32768;
  return elements_per_item >= worthwhile ? 1 : worthwhile / (elements_per_item > 0 ? elements_per_item : 1) + 1;
}

}  // namespace sentfast::cpu
