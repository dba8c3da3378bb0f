// Names of error codes, and the end of a process whose code broke a rule.
#include "transfuse/result.h"

#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace transfuse {

std::string_view error_code_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "INVALID_ARGUMENT";
    case ErrorCode::kLayoutMismatch:
      return "LAYOUT_MISMATCH";
    case ErrorCode::kCorrupt:
      return "CORRUPT";
    case ErrorCode::kNotFound:
      return "NOT_FOUND";
    case ErrorCode::kAlreadyExists:
      return "ALREADY_EXISTS";
    case ErrorCode::kPermissionDenied:
      return "PERMISSION_DENIED";
    case ErrorCode::kResourceExhausted:
      return "RESOURCE_EXHAUSTED";
    case ErrorCode::kUnavailable:
      return "UNAVAILABLE";
    case ErrorCode::kDeadlineExceeded:
      return "DEADLINE_EXCEEDED";
    case ErrorCode::kTornRead:
      return "TORN_READ";
    case ErrorCode::kVersionGone:
      return "VERSION_GONE";
    case ErrorCode::kFingerprintMismatch:
      return "FINGERPRINT_MISMATCH";
    case ErrorCode::kPoisoned:
      return "POISONED";
    case ErrorCode::kCancelled:
      return "CANCELLED";
    case ErrorCode::kGroupBroken:
      return "GROUP_BROKEN";
    case ErrorCode::kUnsupported:
      return "UNSUPPORTED";
    case ErrorCode::kNoFittingSource:
      return "NO_FITTING_SOURCE";
  }
  check_failed(__FILE__, __LINE__, "an ErrorCode outside the enum");
}

void check_failed(const char* file, int line, const char* what) {
  std::fprintf(stderr, "%s:%d: check failed: %s\n", file, line, what);
  std::fflush(stderr);
  std::abort();
}

}  // namespace transfuse
