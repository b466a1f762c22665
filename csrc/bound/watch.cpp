// Whether Python's objects and tensors are as they were, for torchconv/_watch.py: Python itself
// takes ten times as long to look at a network of a hundred tensors.
//
// LibTorch's stable ABI tells neither what a tensor's Python object is nor its version, and every
// question to it is a call. So this is a library of its own, like growth.cpp's, which only the very
// PyTorch that it was compiled with may open. Of Python it calls functions of the stable ABI alone,
// which the process has, whichever Python it is: there is no libpython to link to.
#include <c10/core/TensorImpl.h>

#include <algorithm>
#include <array>
#include <vector>

#define TORCHCONV_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {
#pragma weak PyDict_GetItemWithError
#pragma weak PyDict_Size
#pragma weak PyErr_Clear
#pragma weak PyLong_AsLong
#pragma weak PyLong_AsVoidPtr
#pragma weak PyObject_GenericGetDict
#pragma weak PyObject_GetAttr
#pragma weak PyObject_IsTrue
#pragma weak PyObject_RichCompareBool
#pragma weak PyObject_Type
#pragma weak PyTuple_GetItem
#pragma weak PyTuple_Size
#pragma weak Py_DecRef
#pragma weak Py_IncRef
PyObject* PyDict_GetItemWithError(PyObject* dict, PyObject* key);  // borrowed
ptrdiff_t PyDict_Size(PyObject* dict);
void PyErr_Clear();
long PyLong_AsLong(PyObject* number);
void* PyLong_AsVoidPtr(PyObject* number);
PyObject* PyObject_GenericGetDict(PyObject* object, void* context);
PyObject* PyObject_GetAttr(PyObject* object, PyObject* name);
int PyObject_IsTrue(PyObject* object);
int PyObject_RichCompareBool(PyObject* a, PyObject* b, int op);
PyObject* PyObject_Type(PyObject* object);
PyObject* PyTuple_GetItem(PyObject* tuple, ptrdiff_t at);  // borrowed
ptrdiff_t PyTuple_Size(PyObject* tuple);
void Py_DecRef(PyObject* object);
void Py_IncRef(PyObject* object);
}

namespace torchconv {
namespace {

using Objects = std::vector<PyObject*>;
using Pair = std::array<PyObject*, 2>;

constexpr int kEqual = 2;  // Py_EQ

Objects items(PyObject* tuple) {
  Objects found;
  for (ptrdiff_t i = 0, size = PyTuple_Size(tuple); i < size; ++i)
    found.push_back(PyTuple_GetItem(tuple, i));
  return found;
}

std::vector<Pair> pairs(PyObject* tuple) {
  std::vector<Pair> found;
  for (PyObject* const each : items(tuple))
    found.push_back({PyTuple_GetItem(each, 0), PyTuple_GetItem(each, 1)});
  return found;
}

// Whether what a function returned, a new reference, is this object.
bool is(PyObject* made, PyObject* known) {
  if (made != nullptr) Py_DecRef(made);  // known is alive
  return made == known;
}

// now: of a dict, which Python may change while it compares.
bool are_equal(PyObject* now, PyObject* known) {
  Py_IncRef(now);
  const int result = PyObject_RichCompareBool(now, known, kEqual);
  Py_DecRef(now);
  return result == 1;
}

// An object of a class, with the attributes in this dict.
struct Instance {
  PyObject *object, *type, *attributes;

  explicit Instance(const Objects& fields)
      : object(fields[0]), type(fields[1]), attributes(fields[2]) {}

  bool holds() const {
    return is(PyObject_Type(object), type) &&
           is(PyObject_GenericGetDict(object, nullptr), attributes);
  }
};

struct Table {
  PyObject* dict;
  long size;  // -1: any
  std::vector<Pair> same, equal;
  Objects empty, absent;

  explicit Table(const Objects& fields)
      : dict(fields[0]),
        size(PyLong_AsLong(fields[1])),
        same(pairs(fields[2])),
        equal(pairs(fields[3])),
        empty(items(fields[4])),
        absent(items(fields[5])) {}

  bool holds() const {
    if (size >= 0 && PyDict_Size(dict) != size) return false;
    for (const auto& [key, value] : same)
      if (PyDict_GetItemWithError(dict, key) != value) return false;
    for (const auto& [key, value] : equal) {
      PyObject* const now = PyDict_GetItemWithError(dict, key);
      if (now != value && (now == nullptr || !are_equal(now, value))) return false;
    }
    for (PyObject* const key : empty) {
      PyObject* const now = PyDict_GetItemWithError(dict, key);
      if (now == nullptr || PyObject_IsTrue(now) != 0) return false;
    }
    for (PyObject* const key : absent)
      if (PyDict_GetItemWithError(dict, key) != nullptr) return false;
    return true;
  }
};

// An attribute of an object that may come from its class.
struct Attribute {
  PyObject *object, *name, *value;

  explicit Attribute(const Objects& fields)
      : object(fields[0]), name(fields[1]), value(fields[2]) {}

  bool holds() const { return is(PyObject_GetAttr(object, name), value); }
};

// A tensor, all but what its elements are.
class WatchedTensor {
 public:
  // head: bytes before the at::Tensor in a tensor's Python object.
  WatchedTensor(const Objects& fields, int64_t head)
      : held_(reinterpret_cast<const char*>(fields[0]) + head),
        data_(PyLong_AsVoidPtr(fields[1])),
        version_(PyLong_AsLong(fields[2])),
        sizes_(now().sizes().vec()),
        strides_(now().strides().vec()),
        dtype_(now().dtype()),
        keys_(now().key_set()) {}

  bool holds() const {
    const c10::TensorImpl& impl = now();
    const c10::StorageImpl* const storage = impl.unsafe_storage().unsafeGetStorageImpl();
    if (storage == nullptr || impl.key_set() != keys_ || impl.dtype() != dtype_) return false;
    const auto offset = impl.storage_offset() * static_cast<int64_t>(impl.itemsize());
    return static_cast<const char*>(storage->data()) + offset == data_ && impl.sizes() == sizes_ &&
           impl.strides() == strides_ &&
           (version_ < 0 || impl.version_counter().current_version() == version_);
  }

 private:
  // torch.utils.swap_tensors gives the Python object another one.
  const c10::TensorImpl& now() const { return **reinterpret_cast<c10::TensorImpl* const*>(held_); }

  const char* held_;  // where the Python object has its at::Tensor, which is a pointer
  const void* data_;
  int64_t version_;  // -1: any
  std::vector<int64_t> sizes_, strides_;
  caffe2::TypeMeta dtype_;
  c10::DispatchKeySet keys_;
};

template <typename T, typename... More>
std::vector<T> all_of(PyObject* tuple, More... more) {
  std::vector<T> found;
  for (PyObject* const fields : items(tuple)) found.emplace_back(items(fields), more...);
  return found;
}

template <typename T>
bool all_hold(const std::vector<T>& watched) {
  return std::all_of(watched.begin(), watched.end(), [](const T& each) { return each.holds(); });
}

// Of what it watches, Python keeps all objects alive, where its garbage collector sees them.
struct Watch {
  std::vector<Instance> instances;
  std::vector<Table> tables;
  std::vector<Attribute> attributes;
  std::vector<WatchedTensor> tensors;

  Watch(PyObject* watched, int64_t head)
      : instances(all_of<Instance>(PyTuple_GetItem(watched, 0))),
        tables(all_of<Table>(PyTuple_GetItem(watched, 1))),
        attributes(all_of<Attribute>(PyTuple_GetItem(watched, 2))),
        tensors(all_of<WatchedTensor>(PyTuple_GetItem(watched, 3), head)) {}

  bool holds() const {
    return all_hold(instances) && all_hold(tables) && all_hold(attributes) && all_hold(tensors);
  }
};

}  // namespace

// For whoever holds Python's lock. The tuples are those of torchconv/_watch.py.
TORCHCONV_EXPORT Watch* torchconv_watch(PyObject* watched, int64_t head) {
  return new Watch(watched, head);
}

TORCHCONV_EXPORT bool torchconv_watch_holds(const Watch* watch) {
  const bool holds = watch->holds();
  if (!holds) PyErr_Clear();
  return holds;
}

TORCHCONV_EXPORT void torchconv_end_watch(Watch* watch) { delete watch; }

}  // namespace torchconv
