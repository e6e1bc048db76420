// What decides a model's result outside its call: names in Python's dictionaries and the memory of its tensors,
// compared with what they were when the model was examined.
#pragma once

#include <pybind11/pybind11.h>

void define_watch(pybind11::module_& m);
