// Encoded layouts by digest, counted by the members that use them, bounded in bytes.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

struct LayoutLimits {
  uint64_t layout_bytes = uint64_t{64} << 20;  // of one layout
  uint64_t total_bytes = uint64_t{1} << 30;
  Duration unused =
      std::chrono::seconds(60);  // from put_layout() to join(), and after the last use
};

// Pure state. A layout that no member uses is kept for a while, because it is put before its member
// joins, and is the first to go where room is needed. Used from one thread.
class LayoutStore {
 public:
  explicit LayoutStore(const LayoutLimits& limits) : limits_(limits) {}

  // Putting a layout again only renews it. kResourceExhausted: the bound is reached by layouts in
  // use.
  Result<void> put(const Digest& digest, std::string bytes, TimePoint now);
  bool contains(const Digest& digest) const { return layouts_.contains(digest); }
  // shared: a front end hands a layout out after it has left the lock.
  Result<std::shared_ptr<const std::string>> get(const Digest& digest) const;

  void use(const Digest& digest);  // contains(digest)
  void unuse(const Digest& digest, TimePoint now);
  void drop_unused(TimePoint now);
  uint64_t size_bytes() const { return size_bytes_; }
  size_t count() const { return layouts_.size(); }

 private:
  struct Entry {
    std::shared_ptr<const std::string> bytes;
    uint32_t users = 0;
    TimePoint unused_since;
  };
  void erase_oldest_unused();

  LayoutLimits limits_;
  std::map<Digest, Entry> layouts_;
  std::set<std::pair<TimePoint, Digest>> unused_;
  uint64_t size_bytes_ = 0;
};

}  // namespace transfuse
