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
#pragma weak PyList_Type
#pragma weak PyLong_AsLong
#pragma weak PyLong_AsVoidPtr
#pragma weak PyObject_GenericGetDict
#pragma weak PyObject_GetAttr
#pragma weak PyObject_Hash
#pragma weak PyObject_RichCompareBool
#pragma weak PyObject_Type
#pragma weak PySequence_GetItem
#pragma weak PySequence_Size
#pragma weak PyTuple_GetItem
#pragma weak PyTuple_Size
#pragma weak PyTuple_Type
#pragma weak Py_DecRef
#pragma weak Py_IncRef
PyObject* PyDict_GetItemWithError(PyObject* dict, PyObject* key);  // borrowed
ptrdiff_t PyDict_Size(PyObject* dict);
void PyErr_Clear();
long PyLong_AsLong(PyObject* number);
void* PyLong_AsVoidPtr(PyObject* number);
PyObject* PyObject_GenericGetDict(PyObject* object, void* context);
PyObject* PyObject_GetAttr(PyObject* object, PyObject* name);
ptrdiff_t PyObject_Hash(PyObject* object);
int PyObject_RichCompareBool(PyObject* a, PyObject* b, int op);
PyObject* PyObject_Type(PyObject* object);
PyObject* PySequence_GetItem(PyObject* sequence, ptrdiff_t at);
ptrdiff_t PySequence_Size(PyObject* sequence);
PyObject* PyTuple_GetItem(PyObject* tuple, ptrdiff_t at);  // borrowed
ptrdiff_t PyTuple_Size(PyObject* tuple);
void Py_DecRef(PyObject* object);
void Py_IncRef(PyObject* object);
extern struct _typeobject PyList_Type, PyTuple_Type;
}

namespace torchconv {
namespace {

using Objects = std::vector<PyObject*>;

constexpr int kEqual = 2;  // Py_EQ
constexpr int64_t kLine = 64;

// Where an object's memory has what the stable ABIs do not tell, in bytes from its beginning; -1:
// nowhere.
struct Places {
  int64_t tensor;   // an at::Tensor
  int64_t version;  // the number that each change of a dict changes
};

template <typename T>
const T& at(PyObject* object, int64_t place) {
  return *reinterpret_cast<const T*>(reinterpret_cast<const char*>(object) + place);
}

Objects items(PyObject* tuple) {
  Objects found;
  for (ptrdiff_t i = 0, size = PyTuple_Size(tuple); i < size; ++i)
    found.push_back(PyTuple_GetItem(tuple, i));
  return found;
}

// Whether what a function returned, a new reference, is this object.
bool is(PyObject* made, PyObject* known) {
  if (made != nullptr) Py_DecRef(made);  // known is alive
  return made == known;
}

// The same value of the same type, as are the elements of tuples and lists: a layer may take False
// and not 0. now: of a dict, which Python may change while it compares.
bool are_alike(PyObject* now, PyObject* known) {
  if (now == known) return true;
  Py_IncRef(now);
  PyObject* const type = PyObject_Type(known);
  bool alike = is(PyObject_Type(now), type);
  const void* const address = type;
  if (alike && (address == &PyTuple_Type || address == &PyList_Type)) {
    const ptrdiff_t size = PySequence_Size(known);
    alike = PySequence_Size(now) == size;
    for (ptrdiff_t i = 0; alike && i < size; ++i) {
      PyObject *const a = PySequence_GetItem(now, i), *const b = PySequence_GetItem(known, i);
      alike = a != nullptr && b != nullptr && are_alike(a, b);
      if (a != nullptr) Py_DecRef(a);
      if (b != nullptr) Py_DecRef(b);
    }
    if (!alike) PyErr_Clear();
  } else if (alike) {
    alike = PyObject_RichCompareBool(now, known, kEqual) == 1;
  }
  Py_DecRef(type);
  Py_DecRef(now);
  return alike;
}

// Whether an object has a hash: what has none, such as a list, may change and stay the same object.
bool has_hash(PyObject* object) {
  const bool has = PyObject_Hash(object) != -1;
  if (!has) PyErr_Clear();
  return has;
}

// Memory on its way into the caches before it is read: a network's data have driven it out, and
// asked for at once it arrives together. An address of nothing does no harm.
class Fetch {
 public:
  void add(const void* begin, int64_t bytes) {
    const auto first = reinterpret_cast<uintptr_t>(begin) / kLine * kLine;
    for (uintptr_t line = first; line < reinterpret_cast<uintptr_t>(begin) + bytes; line += kLine)
      lines_.push_back(line);
  }

  void operator()() const {
    for (const uintptr_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line));
  }

 private:
  std::vector<uintptr_t> lines_;
};

// An object of a class, with the attributes in this dict.
class Instance {
 public:
  Instance(const Objects& fields, const Places&, Fetch* fetch)
      : object_(fields[0]), type_(fields[1]), attributes_(fields[2]) {
    // Where the dict is, lies before the object.
    fetch->add(reinterpret_cast<const char*>(object_) - kLine / 2, kLine);
  }

  bool holds() {
    return is(PyObject_Type(object_), type_) &&
           is(PyObject_GenericGetDict(object_, nullptr), attributes_);
  }

 private:
  PyObject *object_, *type_, *attributes_;
};

// A dict of a size, -1 for any, and what it has for some keys. All of that is only looked at where
// something in it has changed, or may have without the dict.
class Table {
 public:
  Table(const Objects& fields, const Places& places, Fetch* fetch)
      : dict_(fields[0]), version_at_(places.version), size_(PyLong_AsLong(fields[1])) {
    for (PyObject* const pair : items(fields[2]))
      entries_.push_back({Relation::kSame, PyTuple_GetItem(pair, 0), PyTuple_GetItem(pair, 1)});
    for (PyObject* const pair : items(fields[3])) {
      entries_.push_back({Relation::kEqual, PyTuple_GetItem(pair, 0), PyTuple_GetItem(pair, 1)});
      if (!has_hash(entries_.back().value)) version_at_ = -1;
    }
    for (PyObject* const key : items(fields[4])) entries_.push_back({Relation::kAbsent, key});
    fetch->add(dict_, kLine / 2);
  }

  bool holds() {
    const uint64_t now = version_at_ < 0 ? 0 : at<uint64_t>(dict_, version_at_);
    if (now != 0 && now == version_) return true;
    if (size_ >= 0 && PyDict_Size(dict_) != size_) return false;
    for (const Entry& entry : entries_)
      if (!entry.holds(dict_)) return false;
    version_ = now;
    return true;
  }

 private:
  enum class Relation { kSame, kEqual, kAbsent };

  struct Entry {
    Relation relation;
    PyObject* key;
    PyObject* value = nullptr;

    bool holds(PyObject* dict) const {
      PyObject* const now = PyDict_GetItemWithError(dict, key);
      switch (relation) {
        case Relation::kSame:
          return now == value;
        case Relation::kEqual:
          return now != nullptr && are_alike(now, value);
        default:
          return now == nullptr;
      }
    }
  };

  PyObject* dict_;
  int64_t version_at_;
  uint64_t version_ = 0;  // with which all of it held; 0: none
  ptrdiff_t size_;
  std::vector<Entry> entries_;
};

// An attribute that may come from the object's class.
class Attribute {
 public:
  Attribute(const Objects& fields, const Places&, Fetch*)
      : object_(fields[0]), name_(fields[1]), value_(fields[2]) {}

  bool holds() { return is(PyObject_GetAttr(object_, name_), value_); }

 private:
  PyObject *object_, *name_, *value_;
};

// A tensor, all but what its elements are.
class WatchedTensor {
 public:
  WatchedTensor(const Objects& fields, const Places& places, Fetch* fetch)
      : impl_(&at<const c10::TensorImpl*>(fields[0], places.tensor)),
        type_at_(&at<PyObject*>(fields[0], places.tensor - sizeof(PyObject*))),
        type_(*type_at_),
        known_(*impl_),
        storage_((*impl_)->unsafe_storage().unsafeGetStorageImpl()),
        data_(PyLong_AsVoidPtr(fields[1])),
        version_(PyLong_AsLong(fields[2])),
        shape_((*impl_)->sizes(), (*impl_)->strides()),
        dtype_((*impl_)->dtype()),
        keys_((*impl_)->key_set()) {
    fetch->add(type_at_, 2 * sizeof(void*));
    fetch->add(*impl_, sizeof(c10::TensorImpl));
    fetch->add(storage_, kLine);
  }

  bool holds() {
    const c10::TensorImpl& now = **impl_;
    if (*impl_ != known_ || *type_at_ != type_ || now.key_set() != keys_ || now.dtype() != dtype_ ||
        now.unsafe_storage().unsafeGetStorageImpl() != storage_)
      return false;
    const auto offset = now.storage_offset() * static_cast<int64_t>(dtype_.itemsize());
    return static_cast<const char*>(storage_->data()) + offset == data_ &&
           shape_.is(now.sizes(), now.strides()) &&
           (version_ < 0 || now.version_counter().current_version() == version_);
  }

 private:
  // Sizes and strides beside everything else, as long as they are no more than those of images.
  class Shape {
   public:
    Shape(c10::IntArrayRef sizes, c10::IntArrayRef strides) : dim_(sizes.size()) {
      if (!fits(sizes)) return;
      std::copy(sizes.begin(), sizes.end(), sizes_.begin());
      std::copy(strides.begin(), strides.end(), strides_.begin());
    }

    bool is(c10::IntArrayRef sizes, c10::IntArrayRef strides) const {
      return fits(sizes) && sizes.size() == dim_ &&
             std::equal(sizes.begin(), sizes.end(), sizes_.begin()) &&
             std::equal(strides.begin(), strides.end(), strides_.begin());
    }

   private:
    bool fits(c10::IntArrayRef sizes) const { return sizes.size() <= sizes_.size(); }

    size_t dim_;
    std::array<int64_t, 4> sizes_, strides_;
  };

  // In the Python object, to which torch.utils.swap_tensors gives another one.
  const c10::TensorImpl* const* impl_;
  // Python's head of an object ends with its class.
  PyObject* const* type_at_;
  PyObject* type_;
  const c10::TensorImpl* known_;  // another one counts its changes for itself
  const c10::StorageImpl* storage_;
  const void* data_;
  int64_t version_;  // -1: any
  Shape shape_;
  caffe2::TypeMeta dtype_;
  c10::DispatchKeySet keys_;
};

template <typename T>
std::vector<T> all_of(PyObject* tuple, const Places& places, Fetch* fetch) {
  std::vector<T> found;
  for (PyObject* const fields : items(tuple)) found.emplace_back(items(fields), places, fetch);
  return found;
}

template <typename T>
bool all_hold(std::vector<T>* watched) {
  return std::all_of(watched->begin(), watched->end(), [](T& each) { return each.holds(); });
}

// Of what it watches, Python keeps all objects alive, where its garbage collector sees them.
class Watch {
 public:
  Watch(PyObject* watched, const Places& places)
      : instances_(all_of<Instance>(PyTuple_GetItem(watched, 0), places, &fetch_)),
        tables_(all_of<Table>(PyTuple_GetItem(watched, 1), places, &fetch_)),
        attributes_(all_of<Attribute>(PyTuple_GetItem(watched, 2), places, &fetch_)),
        tensors_(all_of<WatchedTensor>(PyTuple_GetItem(watched, 3), places, &fetch_)) {}

  bool holds() {
    fetch_();
    return all_hold(&instances_) && all_hold(&tables_) && all_hold(&attributes_) &&
           all_hold(&tensors_);
  }

 private:
  Fetch fetch_;
  std::vector<Instance> instances_;
  std::vector<Table> tables_;
  std::vector<Attribute> attributes_;
  std::vector<WatchedTensor> tensors_;
};

}  // namespace

// Whether Python's functions are in sight: where a program has hidden its Python, they are not.
TORCHCONV_EXPORT bool torchconv_sees_python() { return &PyDict_GetItemWithError != nullptr; }

// For whoever holds Python's lock. The tuples are those of torchconv/_watch.py, the others Places.
TORCHCONV_EXPORT Watch* torchconv_watch(PyObject* watched, int64_t tensor, int64_t version) {
  return new Watch(watched, {tensor, version});
}

TORCHCONV_EXPORT bool torchconv_watch_holds(Watch* watch) {
  const bool holds = watch->holds();
  if (!holds) PyErr_Clear();
  return holds;
}

TORCHCONV_EXPORT void torchconv_end_watch(Watch* watch) { delete watch; }

}  // namespace torchconv
