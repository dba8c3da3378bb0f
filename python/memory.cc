// How the memory of a Python object is found, without torch or numpy.
#include "memory.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "bind.h"
#include "session.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse::python {
namespace {

[[noreturn]] void refuse(ErrorCode code, const ParameterSpec& spec, const std::string& what) {
  throw Failure({code, "parameter '" + spec.name + "': " + what});
}

// How torch and numpy spell our dtypes.
std::string_view framework_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return "float32";
    case Dtype::kF16:
      return "float16";
    case Dtype::kBF16:
      return "bfloat16";
    case Dtype::kF8E4M3:
      return "float8_e4m3fn";
    case Dtype::kF8E5M2:
      return "float8_e5m2";
    case Dtype::kI8:
      return "int8";
    case Dtype::kU8:
      return "uint8";
    case Dtype::kI32:
      return "int32";
    case Dtype::kI64:
      return "int64";
  }
  return "";
}

std::string text_of(nb::handle object) { return nb::str(object).c_str(); }

// Raw bytes (uint8) may stand for any dtype; everything else must be what the layout says.
void check_dtype(const ParameterSpec& spec, std::string_view found) {
  const size_t dot = found.rfind('.');
  if (dot != std::string_view::npos) found.remove_prefix(dot + 1);
  if (found == "uint8" || found == framework_name(spec.dtype)) return;
  refuse(ErrorCode::kLayoutMismatch, spec,
         "the layout says " + std::string(framework_name(spec.dtype)) + ", its memory is " +
             std::string(found));
}

std::string dlpack_name(nb::dlpack::dtype dtype) {
  const std::string bits = std::to_string(dtype.bits);
  switch (static_cast<nb::dlpack::dtype_code>(dtype.code)) {
    case nb::dlpack::dtype_code::Int:
      return "int" + bits;
    case nb::dlpack::dtype_code::UInt:
      return "uint" + bits;
    case nb::dlpack::dtype_code::Float:
      return "float" + bits;
    case nb::dlpack::dtype_code::Bfloat:
      return "bfloat" + bits;
    case nb::dlpack::dtype_code::Float8_E4M3FN:
      return "float8_e4m3fn";
    case nb::dlpack::dtype_code::Float8_E5M2:
      return "float8_e5m2";
    default:
      return "DLPack type code " + std::to_string(dtype.code) + " of " + bits + " bits";
  }
}

std::byte* address(uintptr_t value) { return reinterpret_cast<std::byte*>(value); }

[[noreturn]] void refuse_device(const ParameterSpec& spec, const std::string& device) {
  refuse(ErrorCode::kUnsupported, spec,
         "lies on " + device + "; expected memory of the host or of an NVIDIA GPU");
}

// The ordinal in "cuda:1"; empty for "cpu". Refuses every other device.
std::optional<int> gpu_of(const ParameterSpec& spec, std::string_view device) {
  if (device == "cpu" || device.starts_with("cpu:")) return std::nullopt;
  constexpr std::string_view kCuda = "cuda:";
  int ordinal = 0;
  const std::string_view number = device.substr(std::min(device.size(), kCuda.size()));
  const auto read = std::from_chars(number.data(), number.data() + number.size(), ordinal);
  if (!device.starts_with(kCuda) || read.ec != std::errc() ||
      read.ptr != number.data() + number.size())
    refuse_device(spec, std::string(device));
  return ordinal;
}

// A tensor outlives its memory where a framework frees the storage under it.
void check_storage(const ParameterSpec& spec, nb::handle tensor, uint64_t size_bytes) {
  if (!nb::hasattr(tensor, "untyped_storage")) return;
  const auto held = nb::cast<uint64_t>(tensor.attr("untyped_storage")().attr("nbytes")());
  const auto offset = nb::cast<uint64_t>(tensor.attr("storage_offset")()) *
                      nb::cast<uint64_t>(tensor.attr("element_size")());
  if (offset + size_bytes <= held) return;
  refuse(ErrorCode::kInvalidArgument, spec,
         "its tensor has " + std::to_string(size_bytes) + " bytes from byte " +
             std::to_string(offset) + " of a storage that has " + std::to_string(held) +
             ": the storage was freed or resized under it (weights that FSDP has resharded, an "
             "engine that sleeps); wake it or gather it first");
}

// DLPack's numbers of devices (DLDeviceType) where memory is not ours to move.
std::string dlpack_device(int type, int id) {
  switch (type) {
    case nb::device::cuda_managed::value:
      return "managed memory of CUDA (cudaMallocManaged)";
    case nb::device::rocm::value:
      return "rocm:" + std::to_string(id);
    case nb::device::metal::value:
      return "metal:" + std::to_string(id);
    case nb::device::oneapi::value:
      return "oneapi:" + std::to_string(id);
    default:
      return "DLPack device " + std::to_string(type) + ":" + std::to_string(id);
  }
}

}  // namespace

ParameterOwners::~ParameterOwners() {
  for (Py_buffer& buffer : buffers_) PyBuffer_Release(&buffer);
}

ParameterOwners::ParameterOwners(ParameterOwners&& other) noexcept
    : memory_(std::move(other.memory_)),
      device_(other.device_),
      on_device_(std::move(other.on_device_)),
      objects_(std::move(other.objects_)),
      arrays_(std::move(other.arrays_)),
      buffers_(std::exchange(other.buffers_, {})) {}

void ParameterOwners::add(const Layout& layout, const std::string& name, nb::handle object,
                          bool writable) {
  const auto index = layout.find_parameter(name);
  if (!index)
    throw Failure({ErrorCode::kInvalidArgument,
                   "memory given for '" + name + "', which the layout does not have"});
  const ParameterSpec& spec = layout.parameters()[*index];
  if (add_tensor(spec, object) || add_buffer(spec, object, writable) ||
      add_dlpack(spec, object, writable))
    return;
  refuse(ErrorCode::kInvalidArgument, spec,
         "expected a tensor, an array or a buffer, found " + text_of(object.type()));
}

void ParameterOwners::note_device(const ParameterSpec& spec, int ordinal) {
  if (!device_) {
    device_ = ordinal;
    on_device_ = spec.name;
  }
  if (*device_ == ordinal) return;
  refuse(ErrorCode::kInvalidArgument, spec,
         "lies on " + device_name(ordinal) + " and parameter '" + on_device_ + "' on " +
             device_name(*device_) + ": expected all of one publisher or receiver on one GPU");
}

void ParameterOwners::expect_device(int ordinal) const {
  if (!device_ || *device_ == ordinal) return;
  throw Failure({ErrorCode::kInvalidArgument,
                 "parameter '" + on_device_ + "' lies on " + device_name(*device_) +
                     ", and the device given is " + device_name(ordinal)});
}

void ParameterOwners::expect_host(const std::string& remedy) const {
  if (!device_) return;
  throw Failure({ErrorCode::kUnsupported, "parameter '" + on_device_ + "' lies on " +
                                              device_name(*device_) +
                                              "; expected memory of the host: " + remedy});
}

bool ParameterOwners::add_tensor(const ParameterSpec& spec, nb::handle object) {
  for (const char* name : {"data_ptr", "numel", "element_size", "is_contiguous", "device"}) {
    if (!nb::hasattr(object, name)) return false;
  }
  const std::optional<int> device = gpu_of(spec, text_of(object.attr("device")));
  if (!nb::cast<bool>(object.attr("is_contiguous")()))
    refuse(ErrorCode::kInvalidArgument, spec,
           "its tensor is not contiguous; give a flat view of its storage span, as "
           "transfuse.hf.layout() does");
  check_dtype(spec, text_of(object.attr("dtype")));
  const auto size_bytes = nb::cast<uint64_t>(object.attr("numel")()) *
                          nb::cast<uint64_t>(object.attr("element_size")());
  check_storage(spec, object, size_bytes);
  if (device) note_device(spec, *device);
  memory_.push_back({.name = spec.name,
                     .data = address(nb::cast<uintptr_t>(object.attr("data_ptr")())),
                     .size_bytes = size_bytes});
  objects_.push_back(nb::borrow(object));
  return true;
}

bool ParameterOwners::add_buffer(const ParameterSpec& spec, nb::handle object, bool writable) {
  if (PyObject_CheckBuffer(object.ptr()) == 0) return false;
  Py_buffer buffer;
  const int flags = PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(object.ptr(), &buffer, flags) != 0) {
    const nb::python_error error;
    refuse(ErrorCode::kInvalidArgument, spec, error.what());
  }
  memory_.push_back({.name = spec.name,
                     .data = static_cast<std::byte*>(buffer.buf),
                     .size_bytes = static_cast<uint64_t>(buffer.len)});
  buffers_.push_back(buffer);
  if (nb::hasattr(object, "dtype")) check_dtype(spec, text_of(object.attr("dtype")));
  return true;
}

template <typename Array>
void ParameterOwners::add_array(const ParameterSpec& spec, const Array& array) {
  switch (array.device_type()) {
    case nb::device::cpu::value:
    case nb::device::cuda_host::value:  // pinned memory of the host
      break;
    case nb::device::cuda::value:
      note_device(spec, array.device_id());
      break;
    default:
      refuse_device(spec, dlpack_device(array.device_type(), array.device_id()));
  }
  check_dtype(spec, dlpack_name(array.dtype()));
  int64_t expected = 1;
  for (size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) != 1 && array.stride(i) != expected)
      refuse(ErrorCode::kInvalidArgument, spec, "its array is not contiguous");
    expected *= static_cast<int64_t>(array.shape(i));
  }
  // Read-only arrays come only where nothing is written.
  auto* data = const_cast<std::byte*>(static_cast<const std::byte*>(array.data()));
  memory_.push_back({.name = spec.name, .data = data, .size_bytes = array.nbytes()});
  arrays_.push_back(nb::ndarray<nb::ro>(array));
}

bool ParameterOwners::add_dlpack(const ParameterSpec& spec, nb::handle object, bool writable) {
  if (!nb::hasattr(object, "__dlpack__")) return false;
  if (writable) {
    nb::ndarray<> array;
    if (!nb::try_cast(object, array, false))
      refuse(ErrorCode::kInvalidArgument, spec, "its __dlpack__ gives no writable array");
    add_array(spec, array);
  } else {
    nb::ndarray<nb::ro> array;
    if (!nb::try_cast(object, array, false))
      refuse(ErrorCode::kInvalidArgument, spec, "its __dlpack__ gives no array");
    add_array(spec, array);
  }
  return true;
}

}  // namespace transfuse::python
