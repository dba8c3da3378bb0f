// Errors as values: Result<T> carries a value or one typed Error.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

namespace transfuse {

// A code exists only if some caller branches on it. Each has one row in rpc/convert.cc and one
// Python exception class.
enum class ErrorCode : uint8_t {
  kInvalidArgument,  // the caller's input is wrong; retrying changes nothing
  kLayoutMismatch,   // gaps, overlaps, dtype or shape conflicts between layouts; see diagnose()
  kCorrupt,   // bytes from another process or a file do not parse, or exceed what was registered
  kNotFound,  // no such name, digest, version or region
  kAlreadyExists,      // a live owner has this name, or this version was published before
  kPermissionDenied,   // the kernel or the peer refused; the message names the remedy
  kResourceExhausted,  // memory, shared memory, descriptors or a bound of ours is used up
  kUnavailable,        // the peer or the coordinator is gone; another source or a retry may succeed
  kDeadlineExceeded,   // the deadline passed, or no progress was seen for the no-progress deadline
  kTornRead,           // the source's generation changed while it was read; nothing was committed
  kVersionGone,        // the version was retired, aborted or revoked
  kFingerprintMismatch,  // bytes that arrived differ from what the source holds
  kPoisoned,             // an abandoned operation may still write this memory
  kCancelled,            // ended by the caller
  kGroupBroken,  // ranks of one engine do not hold the same version: none may serve until repaired
  kUnsupported,  // not available in this build or on this host; the message names what is missing
  kNoFittingSource,  // sources are there, but not what the target demands; the message says why
};
inline constexpr int kErrorCodeCount = 17;

// "INVALID_ARGUMENT", "LAYOUT_MISMATCH", ...
std::string_view error_code_name(ErrorCode code);

struct Error {
  ErrorCode code = ErrorCode::kInvalidArgument;
  std::string message;  // names the thing, what was expected and what was found

  std::string to_string() const { return std::string(error_code_name(code)) + ": " + message; }
};

// Prints "file:line: what" and aborts. Behind TRANSFUSE_CHECK and wrong use of Result.
[[noreturn]] void check_failed(const char* file, int line, const char* what);

// Wraps an Error for return from a function of any Result type.
struct Unexpected {
  Error error;
};

template <typename T>
class [[nodiscard]] Result {
 public:
  using value_type = T;
  Result(T value)
      : state_(std::in_place_index<0>, std::move(value)) {}  // NOLINT: implicit by design
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}     // NOLINT
  Result(Unexpected u) : state_(std::in_place_index<1>, std::move(u.error)) {}  // NOLINT

  bool has_value() const { return state_.index() == 0; }
  explicit operator bool() const { return has_value(); }

  T& value() & { return check(), std::get<0>(state_); }
  const T& value() const& { return check(), std::get<0>(state_); }
  T value() && { return check(), std::get<0>(std::move(state_)); }  // not a reference into *this
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T operator*() && { return std::move(*this).value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

  const Error& error() const& { return check_error(), std::get<1>(state_); }
  Error error() && { return check_error(), std::get<1>(std::move(state_)); }

 private:
  void check() const {
    if (!has_value()) check_failed(__FILE__, __LINE__, std::get<1>(state_).to_string().c_str());
  }
  void check_error() const {
    if (has_value()) check_failed(__FILE__, __LINE__, "error() of a Result that holds a value");
  }
  std::variant<T, Error> state_;
};

template <>
class [[nodiscard]] Result<void> {
 public:
  using value_type = void;
  Result() = default;
  Result(Error error) : error_(std::move(error)), failed_(true) {}     // NOLINT: implicit by design
  Result(Unexpected u) : error_(std::move(u.error)), failed_(true) {}  // NOLINT

  bool has_value() const { return !failed_; }
  explicit operator bool() const { return has_value(); }
  void value() const {
    if (failed_) check_failed(__FILE__, __LINE__, error_.to_string().c_str());
  }
  const Error& error() const& {
    if (!failed_) check_failed(__FILE__, __LINE__, "error() of a Result that holds a value");
    return error_;
  }
  Error&& error() && {
    if (!failed_) check_failed(__FILE__, __LINE__, "error() of a Result that holds a value");
    return std::move(error_);
  }

 private:
  Error error_;
  bool failed_ = false;
};

}  // namespace transfuse

// Programmer errors abort, in release too.
#define TRANSFUSE_CHECK(condition) \
  ((condition) ? static_cast<void>(0) : ::transfuse::check_failed(__FILE__, __LINE__, #condition))

#define TRANSFUSE_CONCAT_(a, b) a##b
#define TRANSFUSE_CONCAT(a, b) TRANSFUSE_CONCAT_(a, b)

// Returns the error of `expression` (a Result) from the enclosing function.
#define TRANSFUSE_RETURN_IF_ERROR(expression)                     \
  do {                                                            \
    if (auto status_ = (expression); !status_)                    \
      return ::transfuse::Unexpected{std::move(status_).error()}; \
  } while (false)

// TRANSFUSE_ASSIGN_OR_RETURN(auto x, f()): x = value of f(), or return its error.
#define TRANSFUSE_ASSIGN_OR_RETURN(declaration, expression) \
  TRANSFUSE_ASSIGN_OR_RETURN_(TRANSFUSE_CONCAT(result_, __LINE__), declaration, expression)
#define TRANSFUSE_ASSIGN_OR_RETURN_(name, declaration, expression)    \
  auto name = (expression);                                           \
  if (!name) return ::transfuse::Unexpected{std::move(name).error()}; \
  declaration = std::move(name).value()
