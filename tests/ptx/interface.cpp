#include "interface.h"

#include <algorithm>
#include <sstream>

#include "machine.h"

using namespace ptx;

namespace {

thread_local std::string message;

std::vector<Buffer> buffers_of(const PtxLaunch& launch) {
  std::vector<Buffer> buffers;
  std::istringstream names(launch.names != nullptr ? launch.names : "");
  for (int i = 0; i < launch.range_count; ++i) {
    std::string name;
    std::getline(names, name);
    if (name.empty()) name = "a tensor";
    buffers.push_back({launch.ranges[2 * i], launch.ranges[2 * i + 1], name, {}});
  }
  std::sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) { return a.begin < b.begin; });
  return buffers;
}

const Kernel& kernel_named(void* module, const char* name) {
  const auto& kernels = static_cast<Module*>(module)->kernels;
  const auto found = kernels.find(name);
  if (found == kernels.end()) throw Failure(std::string("no kernel ") + name);
  return found->second;
}

void prepare(Machine& machine, const PtxLaunch& launch) {
  std::copy(launch.grid, launch.grid + 3, machine.grid);
  std::copy(launch.threads, launch.threads + 3, machine.threads);
  machine.random.seed(launch.seed);
  machine.options.moment = static_cast<Moment>(launch.moment);
  machine.options.watch_shared = launch.watch_shared != 0;
  machine.options.watch_global = launch.watch_global != 0;
  machine.options.round_to_zero = launch.round_to_zero != 0;
  machine.parameters = launch.parameters;
  machine.buffers = buffers_of(launch);
  machine.counting = launch.statistics != nullptr;
}

void add_statistics(const Machine& machine, uint64_t* sums) {
  uint64_t counts[sizeof(Statistics) / sizeof(uint64_t)];
  std::memcpy(counts, &machine.counts, sizeof counts);
  for (const uint64_t count : counts) *sums++ += count;
}

}  // namespace

const char* ptx_message() { return message.c_str(); }

void* ptx_load(const char* text) {
  try {
    return parse(text).release();
  } catch (const std::exception& error) {
    message = error.what();
    return nullptr;
  }
}

const char* ptx_kernels(void* module) {
  message.clear();
  for (const auto& [name, kernel] : static_cast<Module*>(module)->kernels) message += name + "\n";
  return message.c_str();
}

int ptx_parameters(void* module, const char* kernel, uint32_t* offsets_and_sizes, int most) {
  const auto& parameters = kernel_named(module, kernel).parameters;
  for (size_t i = 0; i < parameters.size() && static_cast<int>(i) < most; ++i) {
    offsets_and_sizes[2 * i] = parameters[i].offset;
    offsets_and_sizes[2 * i + 1] = parameters[i].bytes;
  }
  return static_cast<int>(parameters.size());
}

int ptx_launch(void* module, const char* name, const PtxLaunch* launch) {
  Machine machine;
  int result = 0;
  message.clear();
  try {
    machine.kernel = &kernel_named(module, name);
    prepare(machine, *launch);
    run_grid(machine, launch->dynamic_shared);
    if (launch->statistics != nullptr) add_statistics(machine, launch->statistics);
    result = machine.errors.empty() ? 0 : 1;
  } catch (const std::exception& error) {
    message = std::string(name) + ", block " + std::to_string(machine.block) + ": " + error.what() + "\n";
    result = 2;
  }
  for (const std::string& error : machine.errors) message += error + "\n";
  return result;
}
