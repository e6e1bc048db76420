// A PTX module after parsing: kernels as lists of decoded instructions.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "values.h"

namespace ptx {

struct Machine;
struct Warp;
struct Instruction;

// Executes an instruction in the lanes of the mask.
using Handler = void (*)(Machine&, Warp&, const Instruction&, uint32_t lanes);

enum class Space { Generic, Global, Shared, Local, Parameter, Constant };

// What the scheduler has to know about an instruction.
enum class Flow { Next, Branch, Return, Barrier };

struct Instruction {
  Handler execute = nullptr;
  Flow flow = Flow::Next;
  bool together = false;  // all lanes of a warp that are alive execute it at the same time
  int predicate = -1;     // register, -1 without
  bool predicate_negated = false;
  std::vector<int> results, sources;  // registers; a constant has a register of its own
  Type type = Type::None, source_type = Type::None;
  Space space = Space::Generic;
  int64_t offset = 0, second_offset = 0;
  int count = 0;                // elements of a vector, matrices of a load, bytes of a copy, groups that may be pending
  int variant = 0;              // what the handler takes it to be
  bool negated = false;         // the last source, a predicate
  bool flushes = false;         // subnormal numbers, of a conversion
  bool saturates = false;       // integer sums of a matrix product
  int columns = 0, depth = 0;   // of a matrix product
  bool a_in_registers = false;  // of wgmma
  bool a_transposed = false, b_transposed = false;  // of wgmma; a also of ldmatrix and stmatrix
  int target = -1;
  int line = 0;
  std::string text;
};

struct Variable {
  Space space;
  uint64_t address;
  bool dynamic_shared;  // as large as the launch says
};

struct Parameter {
  uint32_t offset, bytes;
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  int registers = 0;
  std::vector<std::pair<int, uint64_t>> constants;  // register, value
  std::map<std::string, int> special;               // %tid.x and its like: register
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0, shared_bytes = 0, local_bytes = 0;
  int dynamic_shared_register = -1;  // holds the address of dynamic shared memory
};

struct Module {
  std::map<std::string, Kernel> kernels;
  std::map<std::string, Variable> variables;
  std::vector<std::unique_ptr<std::vector<uint8_t>>> storage;  // of global and constant variables
};

// Why a module cannot be parsed, or a launch cannot go on.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Reads PTX; throws a Failure with the text of what it does not know.
std::unique_ptr<Module> parse(const std::string& text);

}  // namespace ptx
