// Stands in for the CUDA runtime and for what csrc/cuda asks PyTorch about GPUs: tensors on the CPU count as CUDA
// tensors, kernels are entered for the CPU, and a launch goes to the interpreter.
#include <dlfcn.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "interface.h"

namespace {

constexpr int kFailed = 999;  // cudaErrorUnknown
constexpr int kMostRanges = 65536, kMostParameters = 64;

struct Runtime {
  std::map<const void*, std::string> functions;  // by the function that stands for the kernel on the host
  std::map<std::string, void*> modules;          // by kernel
  std::map<std::string, int> launches;
  std::string message;
  std::mt19937 random;
  int moment = 2;
};

Runtime& runtime() {
  static auto* made = new Runtime();  // lives as long as the process
  return *made;
}

std::filesystem::path folder() {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&folder), &info);
  return std::filesystem::path(info.dli_fname).parent_path();
}

// What nvcc has left of each source: folder/NAME/NAME.ptx.
void load_modules() {
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder())) {
    if (entry.path().extension() != ".ptx") continue;
    std::ifstream file(entry.path());
    std::stringstream text;
    text << file.rdbuf();
    void* module = ptx_load(text.str().c_str());
    if (module == nullptr) throw std::runtime_error(entry.path().string() + ": " + ptx_message());
    std::istringstream names(ptx_kernels(module));
    for (std::string name; std::getline(names, name);) runtime().modules[name] = module;
  }
}

struct Dimensions {
  unsigned x, y, z;
};
struct Configuration {  // cudaLaunchConfig_t
  Dimensions grid, block;
  size_t dynamic_shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

// The arguments of a kernel as one block.
std::vector<uint8_t> packed(void* module, const std::string& name, void** arguments) {
  uint32_t layout[2 * kMostParameters];
  const int count = ptx_parameters(module, name.c_str(), layout, kMostParameters);
  std::vector<uint8_t> block(layout[2 * count - 2] + layout[2 * count - 1] + 16);
  for (int i = 0; i < count; ++i) std::memcpy(&block[layout[2 * i]], arguments[i], layout[2 * i + 1]);
  return block;
}

std::vector<uint64_t> tensors() {
  static const auto ranges = reinterpret_cast<int (*)(uint64_t*, int)>(dlsym(RTLD_DEFAULT, "ptx_allocations"));
  std::vector<uint64_t> found(2 * kMostRanges);
  found.resize(ranges == nullptr ? 0 : 2 * ranges(found.data(), kMostRanges));
  return found;
}

int launch(const Configuration& configuration, const std::string& name, void** arguments) {
  Runtime& state = runtime();
  if (state.modules.empty()) load_modules();
  const auto module = state.modules.find(name);
  if (module == state.modules.end()) throw std::runtime_error("no PTX of " + name);
  ++state.launches[name];
  const std::vector<uint8_t> parameters = packed(module->second, name, arguments);
  const std::vector<uint64_t> ranges = tensors();
  PtxLaunch given{};
  const Dimensions &grid = configuration.grid, &block = configuration.block;
  std::memcpy(given.grid, &grid, sizeof grid);
  std::memcpy(given.threads, &block, sizeof block);
  given.dynamic_shared = static_cast<uint32_t>(configuration.dynamic_shared);
  given.seed = static_cast<uint32_t>(state.random());
  given.moment = state.moment;
  given.watch_shared = given.watch_global = given.round_to_zero = 1;
  given.parameters = parameters.data();
  given.ranges = ranges.data();
  given.range_count = static_cast<int>(ranges.size() / 2);
  const int failed = ptx_launch(module->second, name.c_str(), &given);
  if (failed != 0) state.message = ptx_message();
  return failed != 0 ? kFailed : 0;
}

}  // namespace

extern "C" {

// ---- for tests/ptx/cuda_library.py

void ptx_runtime_configure(int moment, unsigned seed) {
  runtime().moment = moment;
  runtime().random.seed(seed);
}

// The kernels that were launched, one per line.
const char* ptx_runtime_launched() {
  static std::string names;
  names.clear();
  for (const auto& [name, count] : runtime().launches) names += name + "\n";
  return names.c_str();
}

// ---- the CUDA runtime

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  runtime().functions[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
// Only the triple brackets call these three, and csrc/cuda has none.
int __cudaPopCallConfiguration(void*, void*, size_t*, void*) { return kFailed; }
int __cudaGetKernel(void*, const void*) { return kFailed; }
int __cudaLaunchKernel(const void*) { return kFailed; }
int cudaSetDevice(int) { return 0; }
const char* cudaGetErrorString(int) { return runtime().message.c_str(); }

int cudaLaunchKernelExC(const Configuration* configuration, const void* function, void** arguments) {
  try {
    return launch(*configuration, runtime().functions.at(function), arguments);
  } catch (const std::exception& error) {
    runtime().message = error.what();
    return kFailed;
  }
}

// ---- PyTorch

int32_t aoti_torch_device_type_cuda() { return 1; }
int32_t aoti_torch_get_device_type(void*, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return 0;
}
int32_t aoti_torch_get_device_index(void*, int32_t* index) {
  *index = 0;
  return 0;
}
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) { return 0; }

int32_t aoti_torch_library_init_impl(const char* name, const char*, const char* file, uint32_t line, void** library) {
  using Function = int32_t (*)(const char*, const char*, const char*, uint32_t, void**);
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  const auto real = reinterpret_cast<Function>(dlsym(torch, "aoti_torch_library_init_impl"));
  return real(name, "CPU", file, line, library);
}
}
