// The weights of this process and their snapshots as peers may read them: generations, regions, and
// the fingerprint tables that peers asked for.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "base/seqlock.h"
#include "plan/copies.h"
#include "session/device_work.h"
#include "session/memory.h"
#include "session/snapshots.h"
#include "session/summed_copies.h"
#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/transport.h"

namespace transfuse {

// Fingerprint tables in registered memory, for one plan: one table for each slot, one after another
// at a stride of table_bytes(). Each is a header, then one sum per run that this layout holds, in
// the order of the runs (CopyTable::held_runs). A reader trusts the sums only between two reads of
// a header whose generation is the one that it expects.
struct TableHeader {
  uint64_t incarnation = 0;  // 0: the table was dropped, who needs it asks again
  uint64_t counter = 0;      // 0: the sums are not complete
  uint64_t progress = 0;     // runs visited for any table while this one is due: grows while the
                             // member is alive
  uint64_t run_count = 0;
};
inline constexpr uint64_t kTableHeaderBytes = 64;
static_assert(sizeof(TableHeader) <= kTableHeaderBytes);
// Of one slot, in whole cache lines.
inline uint64_t table_bytes(size_t held_run_count) {
  const uint64_t size_bytes = kTableHeaderBytes + held_run_count * sizeof(uint64_t);
  return (size_bytes + kTableHeaderBytes - 1) / kTableHeaderBytes * kTableHeaderBytes;
}

struct ServedWeightsOptions {
  uint32_t fingerprint_threads = 0;  // 0: one per usable core
  // True: tables are summed again after every write (a publisher, whose readers come each version).
  // False: only when asked.
  bool keep_tables_fresh = true;
  uint32_t snapshot_slots = 0;
  SnapshotPlace snapshot_place = SnapshotPlace::kWithWeights;
  double snapshot_gigabytes_per_second = 0;  // of snapshots in the host; 0: as fast as possible
};

// Slot 0 is the weights themselves, slots 1 to snapshot_slots are snapshots; each has its own
// generation. Sums tables on its own threads, which help with copies first; begin_write() stops
// sums of its slot. Slots on a device are copied and summed by the device, whole; a
// copy from a device sums what it can of the tables that are known. Writes and copies
// from one thread at a time, the rest internal. Outlived by `transport`, `control` and the memory.
class ServedWeights {
 public:
  // Room for the snapshots is checked before anything is allocated.
  static Result<std::unique_ptr<ServedWeights>> open(Transport& transport, Control& control,
                                                     const Layout& layout, BoundMemory memory,
                                                     const ServedWeightsOptions& options);
  ~ServedWeights();
  ServedWeights(const ServedWeights&) = delete;
  ServedWeights& operator=(const ServedWeights&) = delete;

  uint64_t incarnation() const { return incarnation_; }
  const BoundMemory& memory() const { return memory_; }
  bool on_device(uint32_t slot) const {
    return (slot == 0 ? memory_.place() : snapshots_.place()) == MemoryPlace::kDevice;
  }
  uint32_t slot_count() const { return 1 + snapshots_.count(); }
  Result<std::string> descriptor(const std::string& token);  // encoded MemberDescriptor

  // Where a parameter lies: of the weights themselves (slot 0), or of a snapshot.
  std::byte* data(uint32_t slot, uint32_t parameter) const;

  // Answers table requests for `member` from now on, until stop_serving(). kResourceExhausted:
  // there are no threads to be had, and nothing is served.
  Result<void> serve(MemberId member);
  void stop_serving();

  // The slot's counter becomes odd: whatever a peer reads of it from here on is torn. Waits for
  // sums of it in progress (at most a chunk each).
  void begin_write(uint32_t slot = 0);
  // Between begin_write() and end_write() of a snapshot: all parameters. After an error, which is
  // one of the device or kCancelled, the slot holds nothing.
  Result<void> copy_weights(uint32_t slot, CopyProgress& progress);
  // The counter becomes even: the slot's bytes are those of the generation that is returned.
  Generation end_write(uint32_t slot = 0);

 private:
  struct Sums {               // of one table in one slot
    uint32_t next_chunk = 0;  // to be summed
    uint32_t in_flight = 0;   // chunks
    bool wanted = false;      // sums are due for the slot's generation
    // The copy into the slot has made some of the sums: true at their held runs. Empty: none.
    std::vector<bool> copied;
    uint32_t copied_count = 0;
  };
  // The tables of one plan, under construction or complete. The plan names the runs; this layout is
  // number `own` of its source layouts.
  struct Table {
    Digest key;
    CopyTable copies;
    uint32_t own = 0;
    std::unique_ptr<LocalRegion> region;
    std::vector<Sums> sums;      // per slot
    uint32_t versions_left = 0;  // dropped when no reader asked again for so many versions
    bool busy() const;
    std::byte* bytes(uint32_t slot) const;
    TableHeader* header(uint32_t slot) const;
  };
  struct Slot {
    bool writing = true;          // nothing published yet
    uint64_t counter = 0;         // of the last end_write()
    uint64_t written_as = 0;      // number of that end_write() over all slots
    uint32_t sums_in_flight = 0;  // chunks, of any table
  };
  struct CopyWork {
    uint32_t slot = 0;
    CopyProgress* progress = nullptr;
    size_t next_chunk = 0;
    size_t due_chunks = 0;   // by the rate: the first of them may be copied
    uint64_t due_bytes = 0;  // of them
    uint32_t in_flight = 0;
  };

  ServedWeights(Transport& transport, Control& control, const Layout& layout, BoundMemory memory,
                const ServedWeightsOptions& options);
  void event_loop(MemberId member);
  void work_loop();
  Result<void> add_table(MemberId member, const TableRequest& request);
  Result<std::unique_ptr<Table>> make_table(const TableRequest& request);
  std::string known_table(const TableRequest& request);  // its region, "" if there is none yet
  void announce_tables(MemberId member);
  void want(Table& table, uint32_t slot) REQUIRES(mutex_);
  void make_room_for_table() REQUIRES(mutex_);
  // Sums what it can of the known tables on the way.
  Result<void> copy_from_device(uint32_t slot, CopyProgress& progress);
  // What copies into the slot are made of, for the tables that are known: kept for the next copy.
  struct SlotCopies {
    std::vector<Digest> keys;  // of the tables
    SummedCopies made;
    std::vector<uint64_t> results;
  };
  SlotCopies& slot_copies(uint32_t slot, std::span<Table* const> tables);
  void keep_sums(uint32_t slot, std::span<Table* const> tables, const SlotCopies& copies)
      REQUIRES(mutex_);
  Result<void> copy_in_host(uint32_t slot, CopyProgress& progress);
  // Says which chunks may be copied by now, and returns when the next one may.
  TimePoint make_due(CopyWork& work, TimePoint start) REQUIRES(mutex_);
  // Each does a chunk, without the mutex meanwhile; false if there is none to do.
  bool copy_a_chunk() REQUIRES(mutex_);
  bool sum_a_chunk() REQUIRES(mutex_);
  Table* next_table(uint32_t& slot) REQUIRES(mutex_);
  // The chunks that are summed at once, from `first` on.
  std::span<const Chunk> chunks_at(const Table& table, uint32_t slot, uint32_t first) const;
  Result<void> sum_chunks(const Table& table, uint32_t slot, std::span<const Chunk> chunks) const;
  // Into the table. A reader of what was in the slot before may be looking.
  static void store_sum(const Table& table, uint32_t slot, size_t held_run, uint64_t sum);
  void drop_stale_tables() REQUIRES(mutex_);
  static void mark_dropped(const Table& table);
  GenerationWords& words(uint32_t slot) const;  // in registered memory

  Transport& transport_;
  Control& control_;
  const Layout layout_;
  const BoundMemory memory_;
  const ServedWeightsOptions options_;
  const uint64_t incarnation_;
  Snapshots snapshots_;
  std::vector<SlotCopies> slot_copies_;  // per snapshot; of who copies
  std::unique_ptr<LocalRegion> control_region_;
  std::atomic<bool> stopping_{false};
  std::thread event_thread_;
  std::vector<std::thread> work_threads_;

  Mutex mutex_;
  CondVar changed_;
  std::vector<Slot> slots_ GUARDED_BY(mutex_);
  uint64_t write_count_ GUARDED_BY(mutex_) = 0;
  std::optional<CopyWork> copy_work_ GUARDED_BY(mutex_);
  std::vector<std::unique_ptr<Table>> tables_ GUARDED_BY(mutex_);
};

}  // namespace transfuse
