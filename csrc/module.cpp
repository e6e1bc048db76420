// The Python module `sentfast._C`: reads and sets the instruction set, measures its speed, watches what models are made
// of (watch.h). No tensors here; importing the module registers the operators' CPU kernels with PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/profile.h"
#include "watch.h"

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

// GFLOP/s of calls to run(), each of which returns what it did, for about `seconds`.
template <class F>
double rate(double seconds, F run) {
  const py::gil_scoped_release release;
  using clock = std::chrono::steady_clock;
  const auto start = clock::now();
  double flops = 0, elapsed = 0;
  while (elapsed < seconds) {
    flops += run();
    elapsed = std::chrono::duration<double>(clock::now() - start).count();
  }
  return flops / elapsed * 1e-9;
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
  return rate(seconds, [run] { return run(int64_t{1} << 16); });
}

// GFLOP/s of one thread in a linear layer with a bias, on operands of its own.
double linear_gflops(const std::string& dtype, int64_t rows, int64_t columns, int64_t depth, double seconds) {
  if (dtype != "float32" && dtype != "bfloat16") {
    throw py::value_error("dtype: expected float32 or bfloat16, got " + dtype);
  }
  if (rows < 1 || columns < 1 || depth < 2 || depth % 2 != 0) {
    throw py::value_error("rows, columns, depth: expected positive sizes and an even depth");
  }
  const bool pairs = dtype == "bfloat16";
  const int64_t panels = (columns + kPanel - 1) / kPanel, element = pairs ? 2 : 4;
  std::vector<float> x(static_cast<size_t>(rows * depth * element / 4)),
      weight(static_cast<size_t>(panels * kPanel * depth * element / 4)), bias(static_cast<size_t>(columns)),
      sums(static_cast<size_t>(linear_scratch(rows, depth))), y(static_cast<size_t>(rows * columns));
  const Linear p = {columns, depth, x.data(), depth, weight.data(), 0, bias.data(), kIdentity, y.data(), columns};
  const LinearFn run = kernels().linear_float32[pairs ? 1 : 0];
  return rate(seconds, [&] {
    run(p, {0, rows, 0, panels, sums.data()});
    return 2.0 * static_cast<double>(rows) * static_cast<double>(columns) * static_cast<double>(depth);
  });
}

// Seconds of each stage of the encoder since the last call; measured from now on if `enabled`.
std::map<std::string, double> encoder_profile(bool enabled) {
  std::map<std::string, double> seconds;
  for (int i = 0; i < kStages; ++i) {
    seconds[kStageNames[i]] = static_cast<double>(profile().nanoseconds[i].exchange(0)) * 1e-9;
  }
  profile().enabled = enabled;
  return seconds;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // An unusable SENTFAST_CPU_ISA is an error at import, not at the first call, and before there is a type, which could
  // not be made again.
  isa();
  m.def("isa", [] { return std::string(isa_name(isa())); });
  m.def("set_isa", [](const std::string& name) { set_isa(name.c_str()); }, py::arg("name"));
  m.def("supported_isas", &supported_isas);
  m.def("peak_flops", &peak_flops, py::arg("dtype"), py::arg("seconds"));
  m.def("linear_gflops", &linear_gflops, py::arg("dtype"), py::arg("rows"), py::arg("columns"), py::arg("depth"),
        py::arg("seconds"));
  m.def("encoder_profile", &encoder_profile, py::arg("enabled"));
  define_watch(m);
}
