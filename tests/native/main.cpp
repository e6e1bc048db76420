// Every CPU kernel on every instruction set of this machine, on fresh random inputs, without Python or PyTorch.
// Built and run under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer by tests/test_native.py.
#include "pooling_test.h"
#include "similarity_test.h"

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
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  using namespace sentfast::cpu;
  for (int i = 0; i < kIsas; ++i) {
    if (!isa_supported(static_cast<Isa>(i))) continue;
    set_isa(isa_name(static_cast<Isa>(i)));
    for (int round = 0; round < rounds; ++round) {
      test_dtype<float>();
      test_dtype<BFloat16>();
      test_dtype<Float16>();
    }
    std::printf("%s done\n", isa_name(static_cast<Isa>(i)));
  }
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(check::counts().passed),
              static_cast<long long>(check::counts().failed));
  return check::counts().failed == 0 ? 0 : 1;
}
