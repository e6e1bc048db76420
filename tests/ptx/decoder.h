// From the text of an instruction to what executes it.
#pragma once

#include <string>

#include "names.h"
#include "program.h"

namespace ptx {

struct Decoded {
  Instruction instruction;
  std::string label;  // where a branch goes
};

// Throws a Failure for what no handler is known for: nothing is passed over in silence.
Decoded decode(const std::string& statement, Names& names);

}  // namespace ptx
