// Every CPU kernel on every instruction set of this machine, on fresh random inputs, without Python or PyTorch.
// Built and run under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer by tests/test_native.py.
#include "encoder_test.h"
#include "layers_test.h"
#include "losses_test.h"
#include "pooling_test.h"
#include "search_test.h"
#include "similarity_test.h"
#include "training_test.h"

namespace {

template <class T>
void test_dtype() {
  check::test_pooling<T>(false);
  check::test_pooling<T>(true);
  check::test_normalize<T>();
  for (const auto metric :
       {sentfast::cpu::kCosine, sentfast::cpu::kDot, sentfast::cpu::kEuclidean, sentfast::cpu::kManhattan}) {
    check::test_pairwise<T>(metric);
  }
  check::test_matrix<T, T>(false);
  check::test_matrix<T, T>(true);
  check::test_matrix<float, T>(false);
  check::test_embed<T>();
  check::test_narrow<T>();
  check::test_dropout<T>();
  check::test_norm<T, T>();
  check::test_norm<T, float>();
  check::test_bias_activation<T>();
  check::test_project<T>();
}

// E: the element of a linear layer's rows; Out: of its result.
template <class E, class Out>
void test_linear() {
  check::test_linear<E, Out>();
  check::test_activations<E, Out>();
}

template <class E>
void test_compute() {
  test_linear<E, E>();
  check::test_attention<E>();
  check::test_attention_backward<E>();
  check::test_rotate<E>();
  check::test_gate<E>();
}

void test_encoder() {
  test_compute<float>();
  test_compute<sentfast::cpu::BFloat16>();
  test_linear<sentfast::cpu::BFloat16, float>();
  check::test_layer_norm();
  check::test_product();
}

// A tile of every width, and of every width beside whole ones.
template <class E>
void test_head_sizes() {
  for (int64_t head_dim = 8; head_dim <= 320; head_dim += 8) {
    check::test_attention<E>(head_dim);
    check::test_attention_backward<E>(head_dim);
  }
}

}  // namespace

// check [ROUNDS [best | TIER]]: all instruction sets that there are, the one that would be chosen, or all but one.
int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  using namespace sentfast::cpu;
  const char* which = argc > 2 ? argv[2] : "";
  const bool best = std::strcmp(which, "best") == 0;
  const int chosen = static_cast<int>(isa());
  for (int i = 0; i < kIsas; ++i) {
    const char* name = isa_name(static_cast<Isa>(i));
    if (!isa_supported(static_cast<Isa>(i)) || (best && i != chosen) || std::strcmp(which, name) == 0) continue;
    set_isa(name);
    test_head_sizes<float>();
    test_head_sizes<BFloat16>();
    for (int round = 0; round < rounds; ++round) {
      test_dtype<float>();
      test_dtype<BFloat16>();
      test_dtype<Float16>();
      test_encoder();
      check::test_contrastive();
      check::test_moments();
      check::test_search();
    }
    std::printf("%s done\n", name);
  }
  if (best) std::printf("%s: ", isa_name(static_cast<Isa>(chosen)));
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(check::counts().passed),
              static_cast<long long>(check::counts().failed));
  return check::counts().failed == 0 ? 0 : 1;
}
