// A folder of files that a transport serves as its regions.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::file {

inline constexpr std::string_view kFolderEndpointPrefix = "file-folder:";

// Made for one transport, of mode 0700, and removed with it. Safe to call from any thread; regions
// do not outlive it.
class ServedFolder {
 public:
  // Below `parent`, which is there. `token`: what readers must know, kept in a file.
  static Result<std::unique_ptr<ServedFolder>> open(std::string_view parent,
                                                    std::string_view token);
  ~ServedFolder();
  ServedFolder(const ServedFolder&) = delete;
  ServedFolder& operator=(const ServedFolder&) = delete;

  std::string endpoint() const { return std::string(kFolderEndpointPrefix) + path_; }
  // Zeros, mapped here. kResourceExhausted: the disk is full.
  Result<std::unique_ptr<LocalRegion>> allocate(uint64_t size_bytes);
  void add_stats(TransportStats& stats) const;

 private:
  class Region;
  explicit ServedFolder(std::string path);
  bool in_child() const;

  const std::string path_;
  const pid_t pid_;
  std::atomic<uint64_t> last_id_{0};
  std::atomic<uint64_t> regions_{0};
  std::atomic<uint64_t> region_bytes_{0};
};

std::string region_path(std::string_view folder, RegionId id);
// kUnavailable: no such folder. kPermissionDenied: another token.
Result<void> check_folder(const std::string& path, std::string_view token);
bool folder_is_there(const std::string& path);

}  // namespace transfuse::file
