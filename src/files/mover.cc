// From runs to writes: long plain ones inside the kernel, others through a buffer, and what is
// scattered too finely for writes through a mapping of the target.
#include "files/mover.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/file_identity.h"
#include "copy/copy.h"
#include "copy/file_read.h"
#include "files/folder_writer.h"
#include "files/reading.h"
#include "transfuse/copy.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr uint64_t kKernelCopyBytes = uint64_t{64} << 10;  // less is not worth a call of its own
constexpr uint64_t kPieceBytes = 4096;                     // least piece for a write of its own

// How many innermost elements lie one after another, and the levels outside of them.
struct Contiguous {
  uint64_t elements = 1;
  int outer_levels = 3;
};
Contiguous contiguous(const StridedCopy& copy, const int64_t (&stride)[3]) {
  Contiguous found;
  for (int level = 2; level >= 0; --level) {
    if (copy.count[level] != 1) {
      if (stride[level] != static_cast<int64_t>(found.elements)) break;
      found.elements *= copy.count[level];
    }
    found.outer_levels = level;
  }
  return found;
}

uint64_t target_end(const StridedCopy& copy) {
  uint64_t last = 0;
  for (int level = 0; level < 3; ++level) {
    last += (copy.count[level] - 1) * static_cast<uint64_t>(copy.target_stride[level]);
  }
  return (last + 1) * target_element_bytes(copy.op);
}

bool is_plain(const StridedCopy& copy) {
  return source_element_bytes(copy.op) == target_element_bytes(copy.op);
}

// False where these two files cannot be copied by the kernel.
Result<bool> kernel_copy(const FileSpan& source, uint64_t source_offset, const TargetFile& file,
                         uint64_t target_offset, uint64_t size_bytes) {
  auto from = static_cast<off_t>(source.offset_bytes + source_offset);
  auto to = static_cast<off_t>(target_offset);
  while (size_bytes > 0) {
    const ssize_t put = ::copy_file_range(source.fd, &from, file.fd.get(), &to, size_bytes, 0);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0 && (errno == EXDEV || errno == EINVAL || errno == EOPNOTSUPP || errno == ENOSYS)) {
      return false;
    }
    if (put < 0) return file_error("cannot write", file.path, errno);
    if (put == 0) {
      return Error{ErrorCode::kTornRead, fmt::format("{}: was cut while it was read", source.path)};
    }
    size_bytes -= static_cast<uint64_t>(put);
  }
  return true;
}

// Elements that are too short for writes of their own.
Result<void> mapped_copy(const FileSpan& source, StridedCopy copy, std::span<std::byte> scratch,
                         const TargetFile& file, uint64_t target_offset) {
  const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const uint64_t begin = target_offset / page * page;
  const uint64_t size_bytes = target_offset - begin + target_end(copy);
  void* const mapped = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
                              file.fd.get(), static_cast<off_t>(begin));
  if (mapped == MAP_FAILED) return file_error("cannot map", file.path, errno);
  copy.target = static_cast<std::byte*>(mapped) + (target_offset - begin);
  auto done = run_file_copy(source, copy, scratch, nullptr);
  copy_fence();
  ::munmap(mapped, size_bytes);
  return done;
}

}  // namespace

// What one thread works with.
struct Mover::Work {
  const Reading& reading;
  std::span<const WritablePlace> places;
  std::vector<std::byte> buffer;
  std::vector<std::byte> scratch;  // for what is read

  std::byte* room(uint64_t size_bytes) {
    if (buffer.size() < size_bytes) buffer.resize(size_bytes);
    return buffer.data();
  }
};

Result<void> Mover::move(const Reading& reading, std::span<const WritablePlace> places,
                         const std::function<void(uint64_t)>& progress) {
  const Plan& plan = reading.plan();
  std::vector<Work> work;
  for (uint32_t i = 0; i < threads_; ++i)
    work.push_back({reading, places, {}, std::vector<std::byte>(kFileScratchBytes)});
  return for_each_parallel(
      threads_, plan.chunks().size(),
      [&](uint32_t worker, size_t item) { return move_chunk(work[worker], plan.chunks()[item]); },
      [&] {
        if (progress) progress(moved_bytes_.load(std::memory_order_relaxed));
      });
}

Result<void> Mover::move_chunk(Work& work, const Chunk& chunk) {
  const Plan& plan = work.reading.plan();
  const uint32_t end = chunk.first_run + chunk.run_count;
  for (uint32_t first = chunk.first_run; first < end;) {
    // Runs into one parameter, one after another in the plan: together they often leave no hole.
    const uint32_t parameter = plan.runs()[first].parameter;
    Span span{.begin = UINT64_MAX, .end = 0};
    uint64_t covered = 0;
    uint32_t next = first;
    for (; next < end && plan.runs()[next].parameter == parameter; ++next) {
      const StridedCopy copy = work.reading.copy(next);
      const uint64_t at =
          static_cast<uint64_t>(plan.runs()[next].target_offset) * target_element_bytes(copy.op);
      span.begin = std::min(span.begin, at);
      span.end = std::max(span.end, at + target_end(copy));
      covered += copy.target_bytes();
    }
    if (covered == span.end - span.begin) {
      TRANSFUSE_RETURN_IF_ERROR(move_dense(work, first, next, span));
    } else {
      for (uint32_t run = first; run < next; ++run) {
        TRANSFUSE_RETURN_IF_ERROR(move_scattered(work, run));
      }
    }
    count_bytes(covered);
    first = next;
  }
  return {};
}

// The runs fill `span` of their parameter.
Result<void> Mover::move_dense(Work& work, uint32_t first_run, uint32_t end_run, const Span& span) {
  const Plan& plan = work.reading.plan();
  const WritablePlace& place = work.places[plan.runs()[first_run].parameter];
  const uint64_t size_bytes = span.end - span.begin;
  if (first_run + 1 == end_run && size_bytes >= kKernelCopyBytes) {
    const StridedCopy copy = work.reading.copy(first_run);
    if (is_plain(copy) && contiguous(copy, copy.source_stride).elements == copy.element_count() &&
        contiguous(copy, copy.target_stride).elements == copy.element_count()) {
      TRANSFUSE_ASSIGN_OR_RETURN(
          const bool done, kernel_copy(work.reading.source(first_run), copy.source_offset_bytes,
                                       *place.file, place.offset_bytes + span.begin, size_bytes));
      if (done) return {};
    }
  }
  std::byte* const buffer = work.room(size_bytes);
  for (uint32_t run = first_run; run < end_run; ++run) {
    StridedCopy copy = work.reading.copy(run);
    const uint64_t at =
        static_cast<uint64_t>(plan.runs()[run].target_offset) * target_element_bytes(copy.op);
    copy.target = buffer + (at - span.begin);
    TRANSFUSE_RETURN_IF_ERROR(run_file_copy(work.reading.source(run), copy, work.scratch, nullptr));
  }
  copy_fence();
  return write_at(*place.file, {buffer, size_bytes}, place.offset_bytes + span.begin);
}

// A run with holes at the target: gathered, then written piece by piece.
Result<void> Mover::move_scattered(Work& work, uint32_t run) {
  const Run& entry = work.reading.plan().runs()[run];
  const WritablePlace& place = work.places[entry.parameter];
  StridedCopy copy = work.reading.copy(run);
  const FileSpan source = work.reading.source(run);
  const uint64_t element_bytes = target_element_bytes(copy.op);
  const uint64_t begin =
      place.offset_bytes + static_cast<uint64_t>(entry.target_offset) * element_bytes;
  const Contiguous piece = contiguous(copy, copy.target_stride);
  const uint64_t piece_bytes = piece.elements * element_bytes;
  if (piece.elements != copy.element_count() && piece_bytes < kPieceBytes && place.file->reserved) {
    return mapped_copy(source, copy, work.scratch, *place.file, begin);
  }
  // Packed in the order of the levels, which is that of the pieces.
  const int64_t strides[3] = {copy.target_stride[0], copy.target_stride[1], copy.target_stride[2]};
  const auto inner = static_cast<int64_t>(copy.count[2]);
  copy.target_stride[0] = inner * copy.count[1];
  copy.target_stride[1] = inner;
  copy.target_stride[2] = 1;
  copy.target = work.room(copy.target_bytes());
  TRANSFUSE_RETURN_IF_ERROR(run_file_copy(source, copy, work.scratch, nullptr));
  copy_fence();
  uint64_t counts[3] = {1, 1, 1};
  for (int level = 0; level < piece.outer_levels; ++level) counts[level] = copy.count[level];
  const std::byte* at = copy.target;
  for (uint64_t a = 0; a < counts[0]; ++a) {
    for (uint64_t b = 0; b < counts[1]; ++b) {
      for (uint64_t c = 0; c < counts[2]; ++c) {
        const uint64_t element = a * static_cast<uint64_t>(strides[0]) +
                                 b * static_cast<uint64_t>(strides[1]) +
                                 c * static_cast<uint64_t>(strides[2]);
        TRANSFUSE_RETURN_IF_ERROR(
            write_at(*place.file, {at, piece_bytes}, begin + element * element_bytes));
        at += piece_bytes;
      }
    }
  }
  return {};
}

void Mover::count_bytes(uint64_t bytes) {
  moved_bytes_.fetch_add(bytes, std::memory_order_relaxed);
}

}  // namespace transfuse
