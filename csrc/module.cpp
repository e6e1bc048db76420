// The Python module `sentfast._C`: reads and sets the instruction set, measures its peak. No tensors here; importing
// the module registers the operators' CPU kernels with PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;
using namespace sentfast::cpu;

namespace {

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsas; ++i) {
    if (isa_supported(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
  }
  return names;
}

// GFLOP/s of one thread in a loop of independent multiply-adds on registers.
double peak_flops(const std::string& dtype, double seconds) {
  double (*run)(int64_t) = nullptr;
  if (dtype == "float32") {
    run = kernels().peak_float32;
  } else if (dtype == "bfloat16") {
    run = kernels().peak_bfloat16;
  } else {
    throw py::value_error("dtype: expected float32 or bfloat16, got " + dtype);
  }
  if (run == nullptr)
    throw py::value_error("dtype: " + std::string(isa_name(isa())) + " has no multiply-add of " + dtype);
  const py::gil_scoped_release release;
  using clock = std::chrono::steady_clock;
  const auto start = clock::now();
  double flops = 0, elapsed = 0;
  while (elapsed < seconds) {
    flops += run(int64_t{1} << 16);
    elapsed = std::chrono::duration<double>(clock::now() - start).count();
  }
  return flops / elapsed * 1e-9;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("isa", [] { return std::string(isa_name(isa())); });
  m.def("set_isa", [](const std::string& name) { set_isa(name.c_str()); }, py::arg("name"));
  m.def("supported_isas", &supported_isas);
  m.def("peak_flops", &peak_flops, py::arg("dtype"), py::arg("seconds"));
  isa();  // an unusable SENTFAST_CPU_ISA is an error at import, not at the first call
}
