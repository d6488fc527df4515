// Python objects compared with what they were, for fmft_fast/fusion/unchanged.py: a plan is asked
// for at every solve, and Python alone takes as long for this as a small network's first steps.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

namespace fmft {

namespace py = pybind11;

// Like == in Python, where an object equals itself; a comparison that fails is a change as well.
inline bool is_same(PyObject* now, PyObject* want) {
  if (now == want) return true;
  const bool plain = PyDict_CheckExact(now) || Py_IS_TYPE(now, &PyODict_Type);
  if (plain && PyDict_CheckExact(want) && PyDict_GET_SIZE(want) == 0)
    return PyDict_GET_SIZE(now) == 0;
  const py::object held = py::reinterpret_borrow<py::object>(now);
  const int same = PyObject_RichCompareBool(want, now, Py_EQ);
  if (same < 0) PyErr_Clear();
  return same > 0;
}

// An entry of a dictionary, or of the view of a class's; empty where there is none.
inline py::object entry_of(PyObject* scope, PyObject* key) {
  if (PyDict_CheckExact(scope))
    return py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(scope, key));
  return py::reinterpret_steal<py::object>(PyObject_GetItem(scope, key));
}

// A dictionary with these keys and values in this order.
struct Listing {
  std::vector<std::pair<py::object, py::object>> items;

  explicit Listing(const py::iterable& given) {
    for (const py::handle item : given) {
      const auto pair = py::cast<std::pair<py::object, py::object>>(item);
      items.push_back(pair);
    }
  }

  bool is(PyObject* now) const {
    if (!PyDict_CheckExact(now) || PyDict_GET_SIZE(now) != static_cast<Py_ssize_t>(items.size()))
      return false;
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (const auto& [want_key, want] : items)
      if (!PyDict_Next(now, &at, &key, &value) || !is_same(key, want_key.ptr()) ||
          !is_same(value, want.ptr()))
        return false;
    return true;
  }
};

class Unchanged {
 public:
  Unchanged() = default;

  void size(py::object scope, Py_ssize_t size) { sizes_.push_back({std::move(scope), size}); }
  void entry(py::object scope, py::object key, py::object want) {
    entries_.push_back({std::move(scope), std::move(key), std::move(want)});
  }
  void listing(py::object scope, py::object key, const py::iterable& items) {
    listings_.push_back({std::move(scope), std::move(key), Listing(items)});
  }
  void named(py::dict found, const std::vector<std::pair<py::object, size_t>>& ids) {
    named_.push_back({std::move(found), ids});
  }
  void absent(py::dict scope, py::object key) {
    absent_.push_back({std::move(scope), std::move(key)});
  }
  void type(py::object object, py::object type) {
    types_.push_back({std::move(object), std::move(type)});
  }
  void attribute(py::object object, py::str name, py::object want) {
    attributes_.push_back({std::move(object), std::move(name), std::move(want)});
  }
  void call(py::object look, py::object want) {
    calls_.push_back({std::move(look), std::move(want)});
  }

  bool hold() const {
    const bool found = sizes_hold() && entries_hold() && named_hold() && objects_hold();
    PyErr_Clear();  // what cannot be read any more has changed
    return found;
  }

 private:
  struct Size {
    py::object scope;
    Py_ssize_t size;
  };
  struct Entry {
    py::object scope, key, want;
  };
  struct Listed {
    py::object scope, key;
    Listing want;
  };
  struct Named {
    py::dict found;
    std::vector<std::pair<py::object, size_t>> ids;
  };

  bool sizes_hold() const {
    for (const auto& [scope, size] : sizes_)
      if (PyObject_Size(scope.ptr()) != size) return false;
    return true;
  }

  bool entries_hold() const {
    for (const auto& [scope, key, want] : entries_) {
      const py::object now = entry_of(scope.ptr(), key.ptr());
      if (!now || !is_same(now.ptr(), want.ptr())) return false;
    }
    for (const auto& [scope, key, want] : listings_) {
      const py::object now = entry_of(scope.ptr(), key.ptr());
      if (!now || !want.is(now.ptr())) return false;
    }
    for (const auto& [scope, key] : absent_)
      if (PyDict_Contains(scope.ptr(), key.ptr())) return false;
    return true;
  }

  bool named_hold() const {
    PyObject *key, *value;
    for (const auto& [found, ids] : named_) {
      if (PyDict_GET_SIZE(found.ptr()) != static_cast<Py_ssize_t>(ids.size())) return false;
      Py_ssize_t at = 0;
      for (const auto& [name, id] : ids)
        if (!PyDict_Next(found.ptr(), &at, &key, &value) ||
            reinterpret_cast<size_t>(value) != id || !is_same(key, name.ptr()))
          return false;
    }
    return true;
  }

  bool objects_hold() const {
    for (const auto& [object, type] : types_)
      if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != type.ptr()) return false;
    for (const auto& [object, name, want] : attributes_) {
      const auto now =
          py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), name.ptr()));
      if (!now || !is_same(now.ptr(), want.ptr())) return false;
    }
    for (const auto& [look, want] : calls_) {
      const auto now = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(look.ptr()));
      if (!now || !is_same(now.ptr(), want.ptr())) return false;
    }
    return true;
  }

  std::vector<Size> sizes_;
  std::vector<Entry> entries_, attributes_;
  std::vector<Listed> listings_;
  std::vector<Named> named_;
  std::vector<std::pair<py::object, py::object>> absent_, types_, calls_;
};

inline void bind_unchanged(py::module_& module) {
  py::class_<Unchanged>(module, "Unchanged")
      .def(py::init<>())
      .def("size", &Unchanged::size)
      .def("entry", &Unchanged::entry)
      .def("listing", &Unchanged::listing)
      .def("named", &Unchanged::named)
      .def("absent", &Unchanged::absent)
      .def("type", &Unchanged::type)
      .def("attribute", &Unchanged::attribute)
      .def("call", &Unchanged::call)
      .def("hold", &Unchanged::hold);
}

}  // namespace fmft
