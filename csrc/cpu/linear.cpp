// Weights of linear layers in panels.
#include "tensors.h"

namespace sentfast::cpu {
namespace {

Tensor pack_panels(const Tensor& weight, const std::vector<Tensor>& below, bool pairs) {
  std::vector<Tensor> pieces = {weight};
  pieces.insert(pieces.end(), below.begin(), below.end());
  int64_t rows = 0;
  for (const Tensor& piece : pieces) {
    STD_TORCH_CHECK(piece.is_cpu() && piece.dim() == 2 && piece.size(1) == weight.size(1) &&
                        piece.scalar_type() == weight.scalar_type(),
                    "weight, below: expected CPU matrices of the same dtype and number of columns");
    STD_TORCH_CHECK(rows % kPanel == 0, "below: expected matrices of a multiple of ", kPanel, " rows above the last");
    rows += piece.size(0);
  }
  for (Tensor& piece : pieces) {
    if (piece.stride(1) != 1) piece = torch::stable::contiguous(piece);
  }
  const int64_t columns = weight.size(1), count = (rows + kPanel - 1) / kPanel;
  const int64_t steps = pairs ? (columns + 1) / 2 : columns;
  Tensor panels = pairs ? new_tensor({count, steps, kPanel, 2}, ScalarType::BFloat16)
                        : new_tensor({count, steps, kPanel}, ScalarType::Float);
  auto* out = static_cast<char*>(panels.mutable_data_ptr());
  const PackPanelFn kernel = kernels().pack_panel[pairs ? 1 : 0][dtype_index(weight, "weight")];
  const auto element = static_cast<int64_t>(weight.element_size());
  torch::stable::parallel_for(0, count, grain(kPanel * columns), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      int64_t row = panel * kPanel;
      size_t i = 0;
      for (; row >= pieces[i].size(0); ++i) row -= pieces[i].size(0);
      const int64_t left = pieces[i].size(0) - row, stride = pieces[i].stride(0);
      const char* from = static_cast<const char*>(pieces[i].const_data_ptr()) + row * stride * element;
      kernel({left < kPanel ? left : kPanel, columns, from, stride, out + panel * steps * kPanel * 4});
    }
  });
  return panels;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sentfast, CPU, m) { m.impl("pack_panels", TORCH_BOX(&pack_panels)); }

}  // namespace sentfast::cpu
