// libFuzzer over the tests of tests/native: the input chooses the tier, the test, and every size and option in it.
#include "encoder_test.h"
#include "layers_test.h"
#include "losses_test.h"
#include "pooling_test.h"
#include "search_test.h"
#include "similarity_test.h"
#include "training_test.h"

namespace {

using sentfast::cpu::BFloat16;
using sentfast::cpu::Float16;

void attention() {
  const int64_t head_dim = 2 * check::integer(1, 160);
  check::test_attention<float>(head_dim);
  check::test_attention<BFloat16>(head_dim);
  check::test_attention_backward<float>(head_dim);
  check::test_attention_backward<BFloat16>(head_dim);
}

template <class T>
void rows() {
  check::test_pooling<T>(check::integer(0, 1) == 0);
  check::test_normalize<T>();
  check::test_pairwise<T>(static_cast<sentfast::cpu::Metric>(check::integer(0, 3)));
  check::test_embed<T>();
  check::test_dropout<T>();
  check::test_norm<T, float>();
  check::test_bias_activation<T>();
  check::test_project<T>();
}

void linear() {
  check::test_linear<float, float>();
  check::test_linear<BFloat16, BFloat16>();
  check::test_linear<BFloat16, float>();
}

constexpr void (*kTests[])() = {
    attention,
    linear,
    rows<float>,
    rows<BFloat16>,
    rows<Float16>,
    check::test_product,
    check::test_contrastive,
    check::test_moments,
    check::test_search,
    [] { check::test_matrix<float, BFloat16>(check::integer(0, 1) == 0); },
    [] { check::test_matrix<BFloat16, BFloat16>(check::integer(0, 1) == 0); },
    [] { check::test_matrix<float, float>(check::integer(0, 1) == 0); },
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  check::choices() = {data, size};
  uint64_t seed = size;
  for (size_t i = 0; i < size; ++i) seed = seed * 31 + data[i];
  check::generator().seed(seed);
  sentfast::cpu::set_isa(
      sentfast::cpu::isa_name(static_cast<sentfast::cpu::Isa>(check::integer(0, sentfast::cpu::kIsas - 1))));
  kTests[check::integer(0, std::size(kTests) - 1)]();
  if (check::counts().failed > 0) __builtin_trap();
  return 0;
}
