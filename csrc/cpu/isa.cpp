#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

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
#endif

namespace {

constexpr const char* kNames[kIsas] = {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};

bool has(Isa isa) {
#if defined(__x86_64__)
  // These also ask the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
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
    case Isa::Avx512Bf16:
      return vnni && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::Scalar;
}

Isa best() {
  // Intel's bf16 dot product outside AMX is slower than its float32 multiply-add, so there avx512_vnni is the best
  // tier.
#if defined(__x86_64__)
  __builtin_cpu_init();
  const int top = __builtin_cpu_is("intel") ? static_cast<int>(Isa::Avx512Vnni) : kIsas - 1;
#else
  const int top = 0;
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
  throw std::invalid_argument("cpu_isa: expected scalar, avx2, avx512, avx512_vnni or avx512_bf16, got " + name);
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
    case Isa::Avx512Bf16:
      return avx512_bf16::table();
#endif
    default:
      return scalar::table();
  }
}

const Kernels& kernels() { return kernels_of(isa()); }

}  // namespace sentfast::cpu
