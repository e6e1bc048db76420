#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

// SENTFAST_WITHOUT_BF16: the compiler does not know these instructions, as GCC 9, so their tier is not compiled.
namespace sentfast::cpu {

namespace scalar {
const Kernels& table();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}
namespace avx512_vnni {
const Kernels& table();
}
namespace avx512_bf16 {
const Kernels& table();
}
#elif defined(__aarch64__)
namespace neon {
const Kernels& table();
}
namespace neon_dot {
const Kernels& table();
}
namespace neon_bf16 {
const Kernels& table();
}
#endif

namespace {

constexpr const char* kNames[kIsas] = {"scalar",      "avx2", "avx512",   "avx512_vnni",
                                       "avx512_bf16", "neon", "neon_dot", "neon_bf16"};

#if defined(__aarch64__)
// Optional parts of the architecture; where nobody can be asked, none.
struct Arm {
  bool dot_product = false, bf16 = false, int8_matrix = false;
#if defined(__linux__)
  Arm() {
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    dot_product = (first >> 20 & 1) != 0;   // HWCAP_ASIMDDP
    int8_matrix = (second >> 13 & 1) != 0;  // HWCAP2_I8MM
    bf16 = (second >> 14 & 1) != 0;         // HWCAP2_BF16
  }
#elif defined(__APPLE__)
  static bool feature(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  }
  Arm()
      : dot_product(feature("hw.optional.arm.FEAT_DotProd")),
        bf16(feature("hw.optional.arm.FEAT_BF16")),
        int8_matrix(feature("hw.optional.arm.FEAT_I8MM")) {}
#endif
};
#endif

#if defined(__x86_64__)
// GCC before 11 has no word for it.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 29 & 1) != 0;
}
#endif

bool has(Isa isa) {
#if defined(__x86_64__)
  // These also ask the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::Scalar:
      return true;
    case Isa::Avx2:
      return avx2;
    case Isa::Avx512:
      return avx512;
    case Isa::Avx512Vnni:
      return vnni;
#if !defined(SENTFAST_WITHOUT_BF16)
    case Isa::Avx512Bf16:
      return vnni && __builtin_cpu_supports("avx512bf16");
#endif
    default:
      return false;
  }
#elif defined(__aarch64__)
  static const Arm arm;
  switch (isa) {
    case Isa::Scalar:
    case Isa::Neon:
      return true;
    case Isa::NeonDot:
      return arm.dot_product;
#if !defined(SENTFAST_WITHOUT_BF16)
    case Isa::NeonBf16:
      return arm.dot_product && arm.bf16 && arm.int8_matrix;
#endif
    default:
      return false;
  }
#else
  return isa == Isa::Scalar;
#endif
}

Isa best() {
  // Intel's bf16 dot product outside AMX is slower than its float32 multiply-add, so there avx512_vnni is the best
  // tier.
#if defined(__x86_64__)
  __builtin_cpu_init();
  const int top = __builtin_cpu_is("intel") ? static_cast<int>(Isa::Avx512Vnni) : kIsas - 1;
#else
  const int top = kIsas - 1;
#endif
  for (int i = top; i > 0; --i) {
    if (has(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  return Isa::Scalar;
}

Isa parse(const std::string& name) {
  for (int i = 0; i < kIsas; ++i) {
    if (name != kNames[i]) continue;
    if (has(static_cast<Isa>(i))) return static_cast<Isa>(i);
    throw std::invalid_argument("cpu_isa: this CPU does not support " + name + "; the best it has is " +
                                kNames[static_cast<int>(best())]);
  }
  std::string names = kNames[0];
  for (int i = 1; i < kIsas; ++i) names += std::string(i + 1 < kIsas ? ", " : " or ") + kNames[i];
  throw std::invalid_argument("cpu_isa: expected " + names + ", got " + name);
}

std::atomic<int>& current() {
  static std::atomic<int> value([] {
    const char* name = std::getenv("SENTFAST_CPU_ISA");
    return static_cast<int>(name != nullptr && *name != '\0' ? parse(name) : best());
  }());
  return value;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_supported(Isa isa) { return has(isa); }

Isa isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

void set_isa(const char* name) { current().store(static_cast<int>(parse(name)), std::memory_order_relaxed); }

const Kernels& kernels_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::Avx2:
      return avx2::table();
    case Isa::Avx512:
      return avx512::table();
    case Isa::Avx512Vnni:
      return avx512_vnni::table();
#if !defined(SENTFAST_WITHOUT_BF16)
    case Isa::Avx512Bf16:
      return avx512_bf16::table();
#endif
#elif defined(__aarch64__)
    case Isa::Neon:
      return neon::table();
    case Isa::NeonDot:
      return neon_dot::table();
#if !defined(SENTFAST_WITHOUT_BF16)
    case Isa::NeonBf16:
      return neon_bf16::table();
#endif
#endif
    default:
      return scalar::table();
  }
}

const Kernels& kernels() { return kernels_of(isa()); }

}  // namespace sentfast::cpu
