// One source as a receiver sees it: connection, opened regions, generation and fingerprint tables.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "session/descriptor.h"
#include "session/served_weights.h"
#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/transport.h"

namespace transfuse {

// A reader asks for its table again after so many refits; see ServedWeights.
inline constexpr uint32_t kTableRenewalVersions = 16;

// Valid for one incarnation of one member. Used from one thread; outlived by the transport and the
// control.
class SourceLink {
 public:
  struct Where {  // a parameter of the source
    const RemoteRegion* region = nullptr;
    uint64_t offset_bytes = 0;
  };

  // Asks the coordinator for the descriptor, checks it against `layout` (I13), connects.
  static Result<std::unique_ptr<SourceLink>> open(Transport& transport, Control& control,
                                                  const MemberInfo& info, const Layout& layout,
                                                  Deadline deadline);
  ~SourceLink();
  SourceLink(const SourceLink&) = delete;
  SourceLink& operator=(const SourceLink&) = delete;

  const MemberInfo& info() const { return info_; }
  bool alive() const { return peer_ != nullptr && peer_->alive(); }

  // `slot` is that of the leased version (MemberInfo::slot): kCorrupt if the source has no such
  // slot.
  // Opens the parameter's region when it is first used. Parameters without bytes have none.
  Result<Where> where(uint32_t parameter, uint32_t slot, Deadline deadline);
  Result<Generation> read_generation(uint32_t slot, Deadline deadline);

  // Asks the source to keep a table for the plan, unless it was asked lately.
  Result<void> request_table(MemberId reader, const TableRequest& request, Deadline deadline);
  // Copies the sums that are valid for what is offered into `sums`, one per run that the source
  // holds, in the order of the runs (CopyTable::held_runs). Waits for the source to finish them, as
  // long as it makes progress within `no_progress_ms`.
  struct Offered {  // one version of the source
    uint32_t slot = 0;
    Generation generation;
  };
  Result<void> read_table(MemberId reader, const TableRequest& request, const Offered& offered,
                          std::span<uint64_t> sums, Deadline deadline, int64_t no_progress_ms,
                          const std::atomic<bool>& cancelled);

  // Ends every read of this source: afterwards nothing writes target memory on its behalf.
  void close();

 private:
  struct Table {
    Digest key;
    std::unique_ptr<RemoteRegion> region;
    uint32_t refits_until_renewal = kTableRenewalVersions;
  };

  SourceLink(Transport& transport, Control& control, MemberInfo info, MemberDescriptor descriptor);
  // Reads `words.size()` 64-bit words. The words are staged: a read that is given up cannot touch
  // the caller's memory.
  Result<void> read_words(const RemoteRegion& region, uint64_t offset_bytes,
                          std::span<uint64_t> words, Deadline deadline);
  Result<void> check_slot(uint32_t slot) const;
  Result<Table*> open_table(MemberId reader, const TableRequest& request, size_t run_count,
                            Deadline deadline);
  Result<std::unique_ptr<RemoteRegion>> open_table_region(MemberId reader,
                                                          const TableRequest& request,
                                                          size_t run_count, Deadline deadline);
  Result<Table*> reopen_table(MemberId reader, const TableRequest& request, size_t run_count,
                              Deadline deadline);
  Result<TableHeader> read_header(const Table& table, uint64_t offset_bytes, Deadline deadline);
  Error gone(std::string what) const;

  Transport& transport_;
  Control& control_;
  const MemberInfo info_;
  const MemberDescriptor descriptor_;
  std::unique_ptr<Peer> peer_;
  std::unique_ptr<RemoteRegion> generation_region_;
  std::vector<std::unique_ptr<RemoteRegion>>
      regions_;  // by number in the descriptor; null until used
  std::vector<Table> tables_;
  std::vector<uint64_t> staged_words_;
  StridedCopy word_copy_;
};

}  // namespace transfuse
