// A corpus in codes of 8 or 16 bits with what bounds their error.
#include <tuple>

#include "search_plan.h"

namespace sentfast::cpu {
namespace {

constexpr int64_t kCenterRows = 4096;

// The mean of unit rows, of thousands at most: any vector not longer than 1 is a correct center, a near one makes what
// is left small.
void find_center(const float* data, int64_t stride, int64_t count, int64_t dim, float* center) {
  std::vector<double> sum(dim, 0.0);
  int64_t used = 0;
  for (int64_t i = 0; i < count; i += std::max<int64_t>(1, count / kCenterRows)) {
    const float* row = data + i * stride;
    const double norm = kernels().search.norm(row, dim);
    if (!search_unit_exists(norm)) continue;
    for (int64_t d = 0; d < dim; ++d) sum[d] += row[d] / norm;
    ++used;
  }
  for (int64_t d = 0; d < dim; ++d)
    center[d] = used == 0 ? 0.0f : static_cast<float>(sum[d] / static_cast<double>(used));
}

std::tuple<Tensor, Tensor, Tensor> pack(const Tensor& rows, int64_t bits) {
  check(rows, "rows", ScalarType::Float, 2);
  STD_TORCH_CHECK(bits == 8 || bits == 16, "bits: expected 8 or 16, got ", bits);
  const SearchFormat format = bits == 8 ? kSearchInt8 : kSearchBf16;
  const int64_t group = kSearchGroup[format];
  const RowView view(rows);
  const int64_t count = rows.size(0), dim = view.dim;
  const int64_t panels = (count + kSearchPanel - 1) / kSearchPanel, words = (dim + group - 1) / group;
  Tensor codes =
      new_tensor({panels, words, kSearchPanel, group}, format == kSearchInt8 ? ScalarType::Byte : ScalarType::BFloat16);
  Tensor factors = new_tensor({panels, kSearchFactors, kSearchPanel}, ScalarType::Float);
  Tensor center = new_tensor({dim}, ScalarType::Float);
  auto* panel = static_cast<uint32_t*>(codes.mutable_data_ptr());
  auto* factor = static_cast<float*>(factors.mutable_data_ptr());
  auto* middle = static_cast<float*>(center.mutable_data_ptr());
  const auto* data = static_cast<const float*>(view.get().data);
  find_center(data, view.stride, count, dim, middle);
  const SearchKernels& kernel = kernels().search;
  const double square = kernel.product(middle, middle, dim);
  torch::stable::parallel_for(0, panels, grain(kSearchPanel * dim), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> lines(kSearchPanel * words);
    for (int64_t p = begin; p < end; ++p) {
      float* out = factor + p * kSearchFactors * kSearchPanel;
      std::fill_n(out, kSearchFactors * kSearchPanel, 0.0f);
      const int64_t size = std::min(kSearchPanel, count - p * kSearchPanel);
      for (int64_t j = 0; j < size; ++j) {
        const float* row = data + (p * kSearchPanel + j) * view.stride;
        search_pack_row(format, row, dim, middle, square, &lines[j * words], out + j);
      }
      kernel.panel(lines.data(), words, size, words, kSearchFlip[format], panel + p * words * kSearchPanel);
    }
  });
  return {codes, factors, center};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sentfast, CPU, m) { m.impl("search_pack", TORCH_BOX(&pack)); }

}  // namespace sentfast::cpu
