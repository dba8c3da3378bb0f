// Memory of Python objects: tensors by data_ptr, arrays by DLPack, anything else by buffer
// protocol.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/publisher.h"

namespace transfuse::python {

// Parameters by name with what keeps their memory in place. Holds Python references: create and
// destroy it with the GIL held.
class ParameterOwners {
 public:
  ParameterOwners() = default;
  ~ParameterOwners();
  ParameterOwners(ParameterOwners&& other) noexcept;
  ParameterOwners& operator=(ParameterOwners&&) = delete;

  // Contiguous CPU memory of `object`. Throws Failure naming the parameter where it has none, has
  // another dtype than the layout says, or is read-only and `writable` is asked for.
  void add(const Layout& layout, const std::string& name, nanobind::handle object, bool writable);
  const std::vector<ParameterMemory>& memory() const { return memory_; }

 private:
  bool add_tensor(const ParameterSpec& spec, nanobind::handle object);
  bool add_buffer(const ParameterSpec& spec, nanobind::handle object, bool writable);
  bool add_dlpack(const ParameterSpec& spec, nanobind::handle object, bool writable);
  template <typename Array>
  void add_array(const ParameterSpec& spec, const Array& array);

  std::vector<ParameterMemory> memory_;
  std::vector<nanobind::object> objects_;
  std::vector<nanobind::ndarray<nanobind::ro>> arrays_;
  std::vector<Py_buffer> buffers_;
};

}  // namespace transfuse::python
