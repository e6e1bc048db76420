#include "watch.h"

#include <pybind11/stl.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

// ---- names ----

// Python numbers each change of a dictionary up to 3.11; later versions compare every entry at every call.
uint64_t tag_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  (void)dict;
  return 0;
#endif
}
constexpr bool kTagged = PY_VERSION_HEX < 0x030C0000;

bool scalar(PyObject* x) { return PyFloat_CheckExact(x) || PyLong_CheckExact(x) || PyUnicode_CheckExact(x); }

// The same object, an equal number or text. Never calls code of the objects.
bool alike(PyObject* now, PyObject* before) {
  if (now == before) return true;
  if (now == nullptr || before == nullptr || Py_TYPE(now) != Py_TYPE(before)) return false;
  if (scalar(now)) return PyObject_RichCompareBool(now, before, Py_EQ) == 1;
  if (PyTuple_CheckExact(now) && PyTuple_GET_SIZE(now) == PyTuple_GET_SIZE(before)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(now); ++i) {
      if (!alike(PyTuple_GET_ITEM(now, i), PyTuple_GET_ITEM(before, i))) return false;
    }
    return true;
  }
  return false;
}

// What a name stood for; a method is made anew at each look, so it counts as its function and the object behind it.
class Value {
 public:
  Value() = default;
  explicit Value(PyObject* x) {
    const bool method = x != nullptr && PyMethod_Check(x);
    object_ = py::reinterpret_borrow<py::object>(method ? PyMethod_GET_FUNCTION(x) : x);
    if (method) self_ = py::reinterpret_borrow<py::object>(PyMethod_GET_SELF(x));
  }

  bool is_like(PyObject* x) const {
    if (!self_) return alike(x, object_.ptr());
    return x != nullptr && PyMethod_Check(x) && PyMethod_GET_FUNCTION(x) == object_.ptr() &&
           PyMethod_GET_SELF(x) == self_.ptr();
  }

  int traverse(visitproc visit, void* arg) const {
    Py_VISIT(object_.ptr());
    Py_VISIT(self_.ptr());
    return 0;
  }

 private:
  py::object object_, self_;
};

PyObject* value_of(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// A dictionary and what some keys of it stood for.
class Table {
 public:
  // given: (dictionary, owner or None, keys, barred). The owner's dictionary it has to stay; who asks keeps it alive.
  // barred: the names that may not be added, a set of them, True for all, or None.
  explicit Table(const py::tuple& given) : dict_(given[0]), barred_(given[3]) {
    if (!PyDict_Check(dict_.ptr())) throw py::type_error("tables: expected a dictionary first");
    if (!barred_.is_none() && !PyAnySet_Check(barred_.ptr()) && barred_.ptr() != Py_True)
      throw py::type_error("tables: expected a set, True or None last");
    if (!given[1].is_none()) {
      owner_ = py::object(given[1]).ptr();
      type_ = py::type::of(given[1]);
    }
    for (const py::handle key : given[2]) entries_.emplace_back(py::reinterpret_borrow<py::object>(key), Value());
  }

  void renew() {
    for (auto& [key, value] : entries_) value = Value(value_of(dict_.ptr(), key.ptr()));
    size_ = PyDict_Size(dict_.ptr());
    present_ = count_barred();
    tag_ = tag_of(dict_.ptr());
  }

  bool same() { return same_owner() && same_entries(); }

  int traverse(visitproc visit, void* arg) const {
    for (const py::object* held : {&dict_, &type_, &barred_}) Py_VISIT(held->ptr());
    for (const auto& [key, value] : entries_) {
      Py_VISIT(key.ptr());
      if (const int found = value.traverse(visit, arg)) return found;
    }
    return 0;
  }

 private:
  bool same_owner() const {
    if (owner_ == nullptr) return true;
    if (reinterpret_cast<PyObject*>(Py_TYPE(owner_)) != type_.ptr()) return false;
    return py::reinterpret_steal<py::object>(PyObject_GenericGetDict(owner_, nullptr)).ptr() == dict_.ptr();
  }

  bool same_entries() {
    const uint64_t tag = tag_of(dict_.ptr());
    if (kTagged && tag == tag_) return true;
    const Py_ssize_t size = PyDict_Size(dict_.ptr());
    if (barred_.ptr() == Py_True && size != size_) return false;
    for (const auto& [key, value] : entries_) {
      if (!value.is_like(value_of(dict_.ptr(), key.ptr()))) return false;
    }
    // Without tags a new name is known by the size alone: going through a large dictionary at each call costs too much.
    if ((kTagged || size != size_) && count_barred() != present_) return false;
    tag_ = tag;
    size_ = size;
    return true;
  }

  // Of a set of barred names those that are there: as many as before, if the entries among them still are.
  Py_ssize_t count_barred() const {
    if (!PyAnySet_Check(barred_.ptr())) return 0;
    Py_ssize_t position = 0, count = 0;
    PyObject* key = nullptr;
    while (PyDict_Next(dict_.ptr(), &position, &key, nullptr)) {
      if (PyUnicode_CheckExact(key)) count += PySet_Contains(barred_.ptr(), key);
    }
    return count;
  }

  py::object dict_, type_, barred_;
  PyObject* owner_ = nullptr;
  std::vector<std::pair<py::object, Value>> entries_;
  Py_ssize_t size_ = 0, present_ = 0;
  uint64_t tag_ = 0;
};

// A set to which nothing was added and from which nothing was taken. Adding takes a new place in its table, taking away
// leaves the place as it is, so neither the other way round comes back to the same numbers; a new table has new room.
class Members {
 public:
  explicit Members(const py::object& set) : set_(set) {
    if (!PyAnySet_Check(set.ptr())) throw py::type_error("sets: expected sets");
    renew();
  }

  void renew() { places_ = now(); }
  bool same() const { return now() == places_; }

  int traverse(visitproc visit, void* arg) const {
    Py_VISIT(set_.ptr());
    return 0;
  }

 private:
  using Places = std::tuple<Py_ssize_t, Py_ssize_t, const void*>;

  Places now() const {
    const auto* set = reinterpret_cast<const PySetObject*>(set_.ptr());
    return {set->fill, set->used, set->table};
  }

  py::object set_;
  Places places_;
};

struct Function {
  py::object function, code, defaults, keywords;

  int traverse(visitproc visit, void* arg) const {
    for (const py::object* held : {&function, &code, &defaults, &keywords}) Py_VISIT(held->ptr());
    return 0;
  }
};

class Names {
 public:
  Names() = default;

  // tables: see Table; lists, sets: of lists and sets; functions and cells: of functions and closures.
  Names(const std::vector<py::tuple>& tables, const std::vector<py::object>& lists, const std::vector<py::object>& sets,
        const std::vector<py::object>& functions, const std::vector<py::object>& cells)
      : tables_(tables.begin(), tables.end()), sets_(sets.begin(), sets.end()), cells_(cells), lists_(lists) {
    for (const py::object& function : functions) {
      if (!PyFunction_Check(function.ptr())) throw py::type_error("functions: expected functions of Python");
      functions_.push_back({function, py::object(), py::object(), py::object()});
    }
    renew();
  }

  // Takes what the names stand for now as what they have to stand for.
  void renew() {
    for (Table& table : tables_) table.renew();
    for (Members& set : sets_) set.renew();
    for (Function& f : functions_) {
      f.code = borrowed(PyFunction_GetCode(f.function.ptr()));
      f.defaults = borrowed(PyFunction_GetDefaults(f.function.ptr()));
      f.keywords = borrowed(PyFunction_GetKwDefaults(f.function.ptr()));
    }
    contents_.clear();
    for (const py::object& cell : cells_) contents_.emplace_back(PyCell_GET(cell.ptr()));
    items_.clear();
    for (const py::object& list : lists_) items_.push_back(py::tuple(list));
  }

  bool same() {
    for (Table& table : tables_) {
      if (!table.same()) return false;
    }
    for (const Members& set : sets_) {
      if (!set.same()) return false;
    }
    for (const Function& f : functions_) {
      PyObject* function = f.function.ptr();
      if (PyFunction_GetCode(function) != f.code.ptr() || PyFunction_GetDefaults(function) != f.defaults.ptr() ||
          PyFunction_GetKwDefaults(function) != f.keywords.ptr()) {
        return false;
      }
    }
    for (size_t i = 0; i < cells_.size(); ++i) {
      if (!contents_[i].is_like(PyCell_GET(cells_[i].ptr()))) return false;
    }
    for (size_t i = 0; i < lists_.size(); ++i) {
      PyObject *now = lists_[i].ptr(), *before = items_[i].ptr();
      if (PyList_GET_SIZE(now) != PyTuple_GET_SIZE(before)) return false;
      for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(before); ++k) {
        if (!alike(PyList_GET_ITEM(now, k), PyTuple_GET_ITEM(before, k))) return false;
      }
    }
    return true;
  }

  // What is held, for Python's collector: a name may stand for a function that leads back to who compares the names.
  int traverse(visitproc visit, void* arg) const {
    const auto each = [&](const auto& values) {
      for (const auto& value : values) {
        if (const int found = value.traverse(visit, arg)) return found;
      }
      return 0;
    };
    for (const auto* objects : {&cells_, &lists_, &items_}) {
      for (const py::object& held : *objects) Py_VISIT(held.ptr());
    }
    for (const int found : {each(tables_), each(sets_), each(functions_), each(contents_)}) {
      if (found != 0) return found;
    }
    return 0;
  }

  // At once: what is let go may run code that asks.
  void clear() { Names held = std::exchange(*this, Names()); }

 private:
  static py::object borrowed(PyObject* x) { return py::reinterpret_borrow<py::object>(x); }

  std::vector<Table> tables_;
  std::vector<Members> sets_;
  std::vector<Function> functions_;
  std::vector<py::object> cells_, lists_;
  std::vector<Value> contents_;
  std::vector<py::object> items_;
};

// ---- memory ----

// Where a tensor's elements are, and how they lie there.
struct Place {
  void* data;
  int32_t dtype;
  std::vector<int64_t> sizes, strides;
};

// `impl` is what Tensor._cdata gives; a tensor of PyTorch's C++ is a pointer to it, and a handle points to that.
class Handle {
 public:
  explicit Handle(uintptr_t impl) : impl_(reinterpret_cast<void*>(impl)) {}
  AtenTensorHandle get() { return reinterpret_cast<AtenTensorHandle>(&impl_); }

 private:
  void* impl_;
};

void check(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("a tensor has no place in memory");
}

class Places {
 public:
  explicit Places(const std::vector<py::object>& tensors) : tensors_(tensors) {
    if (!tensors.empty()) cdata_ = py::type::of(tensors.front()).attr("_cdata");
    for (const py::object& tensor : tensors) {
      Handle handle = handle_of(tensor.ptr());
      Place place = {};
      int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
      check(aoti_torch_get_dim(handle.get(), &dim));
      check(aoti_torch_get_sizes(handle.get(), &sizes));
      check(aoti_torch_get_strides(handle.get(), &strides));
      check(aoti_torch_get_data_ptr(handle.get(), &place.data));
      check(aoti_torch_get_dtype(handle.get(), &place.dtype));
      place.sizes.assign(sizes, sizes + dim);
      place.strides.assign(strides, strides + dim);
      places_.push_back(std::move(place));
    }
  }

  bool same() const {
    for (size_t i = 0; i < places_.size(); ++i) {
      if (!same_place(places_[i], handle_of(tensors_[i].ptr()))) return false;
    }
    return true;
  }

 private:
  // PyTorch's own object behind a tensor: another one after torch.utils.swap_tensors. Tensor._cdata, without the search
  // for that name.
  Handle handle_of(PyObject* tensor) const {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    const auto found =
        py::reinterpret_steal<py::object>(Py_TYPE(cdata_.ptr())->tp_descr_get(cdata_.ptr(), tensor, type));
    if (!found) throw py::error_already_set();
    return Handle(reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(found.ptr())));
  }

  static bool same_place(const Place& place, Handle handle) {
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    void* data = nullptr;
    int32_t dtype = 0;
    check(aoti_torch_get_data_ptr(handle.get(), &data));
    if (data != place.data) return false;
    check(aoti_torch_get_dim(handle.get(), &dim));
    if (dim != static_cast<int64_t>(place.sizes.size())) return false;
    check(aoti_torch_get_dtype(handle.get(), &dtype));
    if (dtype != place.dtype) return false;
    check(aoti_torch_get_sizes(handle.get(), &sizes));
    check(aoti_torch_get_strides(handle.get(), &strides));
    return std::equal(sizes, sizes + dim, place.sizes.begin()) &&
           std::equal(strides, strides + dim, place.strides.begin());
  }

  std::vector<py::object> tensors_;
  py::object cdata_;
  std::vector<Place> places_;
};

// Pieces of memory and a hash of every byte that they are to hold, in chunks that can be compared a few at a time.
class Bytes {
 public:
  Bytes(const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& sizes) {
    if (pointers.size() != sizes.size()) throw py::value_error("sizes: expected one per pointer");
    for (size_t i = 0; i < pointers.size(); ++i) add(pointers[i], sizes[i], pointers[i]);
  }

  // Memory that has to hold what `snapshot` holds now.
  void add(uintptr_t pointer, int64_t size, uintptr_t snapshot) {
    const auto* data = reinterpret_cast<const unsigned char*>(pointer);
    const auto* held = reinterpret_cast<const unsigned char*>(snapshot);
    const int64_t first = this->size();
    for (int64_t start = 0; start < size; start += kChunk) {
      chunks_.push_back({data + start, std::min(kChunk, size - start), 0});
    }
    const py::gil_scoped_release release;
    each(first, this->size() - first,
         [&](Chunk& chunk) { chunk.hash = hash({held + (chunk.data - data), chunk.bytes, 0}); });
  }

  // Compares the next chunks, that share of all of them and at least one; all of them for 1.
  bool same(double share) {
    const int64_t count = size();
    if (count == 0) return true;
    const int64_t some =
        std::clamp<int64_t>(static_cast<int64_t>(share * static_cast<double>(count) + 0.999), 1, count);
    const int64_t first = next_;
    next_ = (first + some) % count;
    const py::gil_scoped_release release;
    std::atomic<bool> found{true};
    each(first, some, [&](Chunk& chunk) {
      if (hash(chunk) != chunk.hash) found = false;
    });
    return found;
  }

  int64_t size() const { return static_cast<int64_t>(chunks_.size()); }

 private:
  struct Chunk {
    const unsigned char* data;
    int64_t bytes;
    uint64_t hash;
  };
  static constexpr int64_t kChunk = 32 << 10;
  // Chunks below which threads cost more than they bring.
  static constexpr int64_t kWorthSharing = 32;

  // Each step can be undone when the word is known, so two pieces that differ in one word of a lane never agree; the
  // rotation brings the highest bits, which a product does not spread, to where the next one does.
  static uint64_t step(uint64_t h, uint64_t word) {
    const uint64_t product = (h ^ word) * 0x9e3779b97f4a7c15ull;
    return (product << 31) | (product >> 33);
  }

  static uint64_t hash(const Chunk& chunk) {
    constexpr int64_t lanes = 8;
    uint64_t h[lanes] = {1, 2, 3, 4, 5, 6, 7, 8}, words[lanes];
    int64_t i = 0;
    for (; i + 8 * lanes <= chunk.bytes; i += 8 * lanes) {
      std::memcpy(words, chunk.data + i, sizeof words);
      for (int64_t k = 0; k < lanes; ++k) h[k] = step(h[k], words[k]);
    }
    if (i < chunk.bytes) {
      std::memset(words, 0, sizeof words);
      std::memcpy(words, chunk.data + i, static_cast<size_t>(chunk.bytes - i));
      for (int64_t k = 0; k < lanes; ++k) h[k] = step(h[k], words[k]);
    }
    uint64_t result = h[0];
    for (int64_t k = 1; k < lanes; ++k) result = step(step(result, h[k]), static_cast<uint64_t>(k));
    return result;
  }

  template <class F>
  void each(int64_t first, int64_t count, F f) {
    const int64_t all = size();
    if (count < kWorthSharing) {
      for (int64_t i = 0; i < count; ++i) f(chunks_[static_cast<size_t>((first + i) % all)]);
      return;
    }
    torch::stable::parallel_for(0, count, kWorthSharing / 2, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(chunks_[static_cast<size_t>((first + i) % all)]);
    });
  }

  std::vector<Chunk> chunks_;
  int64_t next_ = 0;
};

// The object behind one of Python's; null while it is being made.
Names* names_of(PyObject* self) {
  const auto held = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return held.holder_constructed() ? held.value_ptr<Names>() : nullptr;
}

void collected(PyHeapTypeObject* heap) {
  PyTypeObject& type = heap->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const Names* names = names_of(self);
    return names == nullptr ? 0 : names->traverse(visit, arg);
  };
  type.tp_clear = [](PyObject* self) {
    if (Names* names = names_of(self)) names->clear();
    return 0;
  };
}

}  // namespace

void define_watch(py::module_& m) {
  py::class_<Names>(m, "Names", py::custom_type_setup(collected))
      .def(py::init<const std::vector<py::tuple>&, const std::vector<py::object>&, const std::vector<py::object>&,
                    const std::vector<py::object>&, const std::vector<py::object>&>(),
           py::arg("tables"), py::arg("lists"), py::arg("sets"), py::arg("functions"), py::arg("cells"))
      .def("same", &Names::same)
      .def("renew", &Names::renew);
  py::class_<Places>(m, "Places")
      .def(py::init<const std::vector<py::object>&>(), py::arg("tensors"))
      .def("same", &Places::same);
  py::class_<Bytes>(m, "Bytes")
      .def(py::init<const std::vector<uintptr_t>&, const std::vector<int64_t>&>(), py::arg("pointers"),
           py::arg("sizes"))
      .def("add", &Bytes::add, py::arg("pointer"), py::arg("size"), py::arg("snapshot"))
      .def("same", &Bytes::same, py::arg("share"))
      .def("__len__", &Bytes::size);
}
