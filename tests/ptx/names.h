// What the names in a kernel stand for: registers, variables, parameters.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "program.h"

namespace ptx {

// The register and the distance of [register + distance]; register -1 if the distance is the whole address.
struct Address {
  int base;
  int64_t distance;
};

class Names {
 public:
  explicit Names(Module& module) : module_(module) {}

  void enter_kernel(Kernel& kernel);
  void leave_kernel();
  void enter_scope() { scopes_.emplace_back(); }
  void leave_scope() { scopes_.pop_back(); }

  void declare_registers(const std::string& declaration);
  void declare_parameters(const std::string& list);
  // With an initial value, if there is one.
  void declare_variable(const std::string& declaration);

  // The register of an operand; constants and addresses of variables get a register of their own.
  int operand(const std::string& text, Type type);
  std::vector<int> group(const std::string& text, Type type);
  Address address(const std::string& text);

 private:
  int new_register() { return kernel_->registers++; }
  int find(const std::string& name) const;
  int constant(uint64_t value);
  int special(const std::string& name);
  int of_variable(const Variable& variable);
  void declare_parameter(const std::string& declaration);
  uint64_t reserve(Space space, uint64_t bytes, uint64_t alignment);
  void initialise(uint64_t address, const std::string& declaration, int bytes);

  Module& module_;
  Kernel* kernel_ = nullptr;
  std::vector<std::map<std::string, int>> scopes_;
  std::map<uint64_t, int> constants_;
  std::map<std::string, uint32_t> parameters_;
  uint64_t shared_end_ = 0, local_end_ = 0;
  int sink_ = -1;  // the register of results that nobody wants
};

}  // namespace ptx
