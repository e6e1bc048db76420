// Instruction sets: which ones this CPU has, which one is in use.
#pragma once

#include "kernels.h"

namespace sentfast::cpu {

enum class Isa : int { Scalar = 0, Avx2 = 1, Avx512 = 2, Avx512Vnni = 3, Avx512Bf16 = 4 };
constexpr int kIsas = 5;

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

// The one in use: the best supported, or SENTFAST_CPU_ISA. A name this build or CPU lacks throws std::invalid_argument.
Isa isa();
void set_isa(const char* name);

// The kernels of the instruction set in use.
const Kernels& kernels();
const Kernels& kernels_of(Isa isa);

}  // namespace sentfast::cpu
