// Instruction sets: which ones this CPU has, which one is in use.
#pragma once

#include "kernels.h"

namespace sentfast::cpu {

// Plainest first, of each architecture.
enum class Isa : int { Scalar, Avx2, Avx512, Avx512Vnni, Avx512Bf16, Neon, NeonDot, NeonBf16 };
constexpr int kIsas = 8;

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

// The one in use: the best supported, or SENTFAST_CPU_ISA. A name this build or CPU lacks throws std::invalid_argument.
Isa isa();
void set_isa(const char* name);

// The kernels of the instruction set in use.
const Kernels& kernels();
const Kernels& kernels_of(Isa isa);

}  // namespace sentfast::cpu
