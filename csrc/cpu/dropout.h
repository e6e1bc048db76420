// What an operator is told about dropout, as the kernels read it.
#pragma once

#include "tensors.h"

namespace sentfast::cpu {

inline Dropout dropout_of(double p, int64_t seed, int64_t stream) {
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "dropout_p: expected a number from 0 to 1, got ", p);
  constexpr double range = 4294967296.0;
  const double limit = p * range;
  // With p = 1 one number in 2^32 stays, and is multiplied by 0.
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(stream),
          limit >= range ? UINT32_MAX : static_cast<uint32_t>(limit),
          p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f};
}

}  // namespace sentfast::cpu
