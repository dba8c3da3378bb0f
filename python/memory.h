// Memory of Python objects: tensors by data_ptr, arrays by DLPack, anything else by buffer
// protocol.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <optional>
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

  // Contiguous memory of `object`, on a CPU or an NVIDIA GPU. Throws Failure naming the parameter
  // where it has none, has another dtype than the layout says, lies on another GPU than one before
  // it, or is read-only and `writable` is asked for.
  void add(const Layout& layout, const std::string& name, nanobind::handle object, bool writable);
  const std::vector<ParameterMemory>& memory() const { return memory_; }
  // The GPU that parameters lie on, by its ordinal in this process; empty: none lies on one.
  std::optional<int> device() const { return device_; }
  // kInvalidArgument, naming the parameter, where they lie on a GPU other than this.
  void expect_device(int ordinal) const;
  // kUnsupported, naming a parameter, where one lies on a GPU; `remedy` ends the message.
  void expect_host(const std::string& remedy) const;

 private:
  bool add_tensor(const ParameterSpec& spec, nanobind::handle object);
  bool add_buffer(const ParameterSpec& spec, nanobind::handle object, bool writable);
  bool add_dlpack(const ParameterSpec& spec, nanobind::handle object, bool writable);
  void note_device(const ParameterSpec& spec, int ordinal);
  template <typename Array>
  void add_array(const ParameterSpec& spec, const Array& array);

  std::vector<ParameterMemory> memory_;
  std::optional<int> device_;
  std::string on_device_;  // the first parameter there
  std::vector<nanobind::object> objects_;
  std::vector<nanobind::ndarray<nanobind::ro>> arrays_;
  std::vector<Py_buffer> buffers_;
};

}  // namespace transfuse::python
