// Runs every kernel of csrc/cuda on the CPU and compares it with plain double arithmetic. Exit status 1: a difference.
#include "arrays.h"

namespace driver {

// The shim's own roundings: every float16 survives the way to float32 and back, halfway cases go to even.
void test_conversions() {
  ++cases;
  for (int bits = 0; bits < 65536; ++bits) {
    const __half half{static_cast<uint16_t>(bits)};
    const float value = __half2float(half);
    const uint16_t back = __float2half_rn(value).bits;
    expect(isnan(value) ? (back & 0x7fff) > 0x7c00 : back == bits, "float16 round trip", back, bits, bits);
    const __nv_bfloat16 brain{static_cast<uint16_t>(bits)};
    const float wide = __bfloat162float(brain);
    const uint16_t again = __float2bfloat16_rn(wide).bits;
    expect(isnan(wide) ? (again & 0x7fff) > 0x7f80 : again == bits, "bfloat16 round trip", again, bits, bits);
    // Between this one and the next: just below the middle down, the middle to even, just above it up.
    if (bits >= 0x7bff) continue;
    const __half next{static_cast<uint16_t>(bits + 1)};
    const float middle = (value + __half2float(next)) / 2;
    const int even = bits % 2 ? bits + 1 : bits;
    expect(__float2half_rn(middle).bits == even, "float16 tie", __float2half_rn(middle).bits, even, bits);
    expect(__float2half_rn(nextafterf(middle, 0)).bits == bits, "float16 below", 0, bits, bits);
    expect(__float2half_rn(nextafterf(middle, INFINITY)).bits == bits + 1, "float16 above", 0, bits + 1, bits);
  }
  expect(__float2bfloat16_rn(1.00390625f).bits == 0x3f80, "bfloat16 tie", 0, 0x3f80, 0);
  expect(__float2bfloat16_rn(1.01171875f).bits == 0x3f82, "bfloat16 tie", 0, 0x3f82, 1);
  expect(__float2bfloat16_rn(1.003907f).bits == 0x3f81, "bfloat16 above", 0, 0x3f81, 2);
}

}  // namespace driver

int main() {
  driver::test_conversions();
  driver::test_similarity();
  driver::test_matrix();
  driver::test_pooling();
  driver::test_attention();
  const cuda_shim::Counts& counts = cuda_shim::counts;
  printf("%lld cases, %lld launches, %lld blocks, %lld switches, %lld checks, %lld failures\n",
         static_cast<long long>(driver::cases), static_cast<long long>(counts.launches),
         static_cast<long long>(counts.blocks), static_cast<long long>(counts.switches),
         static_cast<long long>(driver::checks), static_cast<long long>(driver::failures));
  return driver::failures == 0 ? 0 : 1;
}
