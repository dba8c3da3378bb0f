// Encoded layouts by digest: room is made by those that nobody uses, oldest first.
#include "control/layout_store.h"

#include <fmt/format.h>
#include <memory>
#include <string>
#include <utility>
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

Result<void> LayoutStore::put(const Digest& digest, std::string bytes, TimePoint now) {
  if (auto found = layouts_.find(digest); found != layouts_.end()) {
    Entry& entry = found->second;
    if (entry.users == 0) {
      unused_.erase({entry.unused_since, digest});
      entry.unused_since = now;
      unused_.emplace(now, digest);
    }
    return {};
  }
  if (bytes.size() > limits_.layout_bytes) {
    return Error{ErrorCode::kResourceExhausted,
                 fmt::format("layout {} has {} bytes, at most {} are accepted", digest.to_string(),
                             bytes.size(), limits_.layout_bytes)};
  }
  while (size_bytes_ + bytes.size() > limits_.total_bytes && !unused_.empty()) {
    erase_oldest_unused();
  }
  if (size_bytes_ + bytes.size() > limits_.total_bytes) {
    return Error{
        ErrorCode::kResourceExhausted,
        fmt::format("no room for layout {} of {} bytes: {} of {} bytes hold layouts in use",
                    digest.to_string(), bytes.size(), size_bytes_, limits_.total_bytes)};
  }
  size_bytes_ += bytes.size();
  layouts_.emplace(digest, Entry{.bytes = std::make_shared<const std::string>(std::move(bytes)),
                                 .users = 0,
                                 .unused_since = now});
  unused_.emplace(now, digest);
  return {};
}

Result<std::shared_ptr<const std::string>> LayoutStore::get(const Digest& digest) const {
  const auto found = layouts_.find(digest);
  if (found == layouts_.end()) {
    return Error{ErrorCode::kNotFound, fmt::format("no layout has digest {}", digest.to_string())};
  }
  return found->second.bytes;
}

void LayoutStore::use(const Digest& digest) {
  const auto found = layouts_.find(digest);
  TRANSFUSE_CHECK(found != layouts_.end());
  Entry& entry = found->second;
  if (entry.users == 0) unused_.erase({entry.unused_since, digest});
  ++entry.users;
}

void LayoutStore::unuse(const Digest& digest, TimePoint now) {
  const auto found = layouts_.find(digest);
  TRANSFUSE_CHECK(found != layouts_.end() && found->second.users > 0);
  Entry& entry = found->second;
  if (--entry.users > 0) return;
  entry.unused_since = now;
  unused_.emplace(now, digest);
}

void LayoutStore::drop_unused(TimePoint now) {
  while (!unused_.empty() && unused_.begin()->first + limits_.unused <= now) erase_oldest_unused();
}

void LayoutStore::erase_oldest_unused() {
  const auto found = layouts_.find(unused_.begin()->second);
  size_bytes_ -= found->second.bytes->size();
  layouts_.erase(found);
  unused_.erase(unused_.begin());
}

}  // namespace transfuse
