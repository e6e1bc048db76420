// Every kernel for the instruction set `scalar`. Only this file is compiled with its flags, so nothing here may be
// an inline function that other files share: the linker could keep this copy for all of them.

#include <cmath>
#include <cstring>
#include "kernels.h"
namespace sentfast::cpu::scalar {
namespace {
#include "vec_scalar.h"
// clang-format off: the order matters
#include "loops.inl.h"
#include "pooling.inl.h"
#include "rows.inl.h"
#include "gemm.inl.h"
#include "matrix.inl.h"
#include "math.inl.h"
#include "linear_in_place.inl.h"
#include "linear.inl.h"
#include "product.inl.h"
#include "dropout.inl.h"
#include "attention.inl.h"
#include "attention_backward.inl.h"
#include "layers.inl.h"
#include "norm.inl.h"
#include "activation.inl.h"
#include "losses.inl.h"
#include "search_exact.inl.h"
#include "search.inl.h"
// clang-format on
}  // namespace
#define SENTFAST_PEAK_FLOAT32 nullptr
#include "table.inl.h"
}  // namespace sentfast::cpu::scalar
