// One source as a receiver sees it: connection, opened regions, generation and fingerprint tables;
// and the members of a job as such sources.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "plan/copies.h"
#include "session/descriptor.h"
#include "session/served_weights.h"
#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/transport.h"

namespace transfuse {

// A reader asks for its table again after so many refits; see ServedWeights.
inline constexpr uint32_t kTableRenewalVersions = 16;

// The sums that are wanted of a source: those of its runs in a plan, for one of its versions.
struct SumQuery {
  MemberId reader{};
  TableRequest request;
  const CopyTable* copies = nullptr;  // of the plan
  uint32_t source_layout = 0;         // the source's own, in the plan
  uint32_t slot = 0;
  Generation generation;
};

// Valid for one incarnation of one source. Used from one thread.
class SourceLink {
 public:
  struct Where {  // a parameter of the source
    const RemoteRegion* region = nullptr;
    uint64_t offset_bytes = 0;
  };

  virtual ~SourceLink() = default;
  SourceLink(const SourceLink&) = delete;
  SourceLink& operator=(const SourceLink&) = delete;

  const MemberInfo& info() const { return info_; }
  virtual bool alive() const = 0;

  // `slot` is that of the leased version (MemberInfo::slot): kCorrupt if the source has no such
  // slot.
  // Opens the parameter's region when it is first used. Parameters without bytes have none.
  virtual Result<Where> where(uint32_t parameter, uint32_t slot, Deadline deadline) = 0;
  virtual Result<Generation> read_generation(uint32_t slot, Deadline deadline) = 0;

  // Asks the source to keep a table for the plan, unless it was asked lately.
  virtual Result<void> request_table(MemberId reader, const TableRequest& request,
                                     Deadline deadline) = 0;
  // Copies the sums that are valid for what is offered into `sums`, one per run that the source
  // holds, in the order of the runs (CopyTable::held_runs). Waits for the source to finish them, as
  // long as it makes progress within `no_progress_ms`.
  virtual Result<void> read_table(const SumQuery& query, std::span<uint64_t> sums,
                                  Deadline deadline, int64_t no_progress_ms,
                                  const std::atomic<bool>& cancelled) = 0;

  // Ends every read of this source: afterwards nothing writes target memory on its behalf.
  virtual void close() = 0;

 protected:
  explicit SourceLink(MemberInfo info) : info_(std::move(info)) {}

  const MemberInfo info_;
};

// Where the sources of an attempt are found. Used from one thread.
class SourceDirectory {
 public:
  virtual ~SourceDirectory() = default;
  virtual Result<Layout> layout(const Digest& digest, Deadline deadline) = 0;
  virtual Result<std::unique_ptr<SourceLink>> open(const MemberInfo& info, const Layout& layout,
                                                   Deadline deadline) = 0;
};

// A member of the job. Outlived by the transport and the control.
class MemberLink final : public SourceLink {
 public:
  // `target`: where what is read will lie. Asks the coordinator for the descriptor, checks it
  // against `layout` (I13), connects.
  static Result<std::unique_ptr<MemberLink>> open(Transport& transport, Control& control,
                                                  const MemberInfo& info, const Layout& layout,
                                                  MemoryPlace target, Deadline deadline);
  ~MemberLink() override;

  bool alive() const override { return peer_ != nullptr && peer_->alive(); }
  Result<Where> where(uint32_t parameter, uint32_t slot, Deadline deadline) override;
  Result<Generation> read_generation(uint32_t slot, Deadline deadline) override;
  Result<void> request_table(MemberId reader, const TableRequest& request,
                             Deadline deadline) override;
  Result<void> read_table(const SumQuery& query, std::span<uint64_t> sums, Deadline deadline,
                          int64_t no_progress_ms, const std::atomic<bool>& cancelled) override;
  void close() override;

 private:
  struct Table {
    Digest key;
    std::unique_ptr<RemoteRegion> region;
    uint32_t refits_until_renewal = kTableRenewalVersions;
  };

  MemberLink(Transport& transport, Control& control, MemberInfo info, MemberDescriptor descriptor,
             MemoryPlace target);
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
  const MemoryPlace target_;
  const MemberDescriptor descriptor_;
  std::unique_ptr<Peer> peer_;
  std::unique_ptr<RemoteRegion> generation_region_;
  std::vector<std::unique_ptr<RemoteRegion>>
      regions_;  // by number in the descriptor; null until used
  std::vector<Table> tables_;
  std::vector<uint64_t> staged_words_;
  StridedCopy word_copy_;
};

// Used from one thread. Outlived by the transport and the control.
class MemberDirectory final : public SourceDirectory {
 public:
  MemberDirectory(Transport& transport, Control& control, MemoryPlace target)
      : transport_(transport), control_(control), target_(target) {}
  Result<Layout> layout(const Digest& digest, Deadline deadline) override {
    return control_.get_layout(digest, deadline);
  }
  Result<std::unique_ptr<SourceLink>> open(const MemberInfo& info, const Layout& layout,
                                           Deadline deadline) override;

 private:
  Transport& transport_;
  Control& control_;
  const MemoryPlace target_;
};

}  // namespace transfuse
