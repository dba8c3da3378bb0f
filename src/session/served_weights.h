// The weights of this process as peers may read them: generation, regions, and the fingerprint
// tables that peers asked for.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "base/seqlock.h"
#include "session/copies.h"
#include "session/memory.h"
#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/transport.h"

namespace transfuse {

// A fingerprint table in registered memory, for one plan: header, then one sum per run that this
// layout holds, in the order of the runs (CopyTable::held_runs). A reader trusts the sums only
// between two reads of a header whose generation is the one that it expects.
struct TableHeader {
  uint64_t incarnation = 0;  // 0: the table was dropped, who needs it asks again
  uint64_t counter = 0;      // 0: the sums are not complete
  uint64_t progress = 0;     // runs visited for any table while this one is due: grows while the
                             // member is alive
  uint64_t run_count = 0;
};
inline constexpr uint64_t kTableHeaderBytes = 64;
static_assert(sizeof(TableHeader) <= kTableHeaderBytes);
inline uint64_t table_bytes(size_t held_run_count) {
  return kTableHeaderBytes + held_run_count * sizeof(uint64_t);
}

struct ServedWeightsOptions {
  uint32_t fingerprint_threads = 0;  // 0: one per usable core
  // True: tables are summed again after every write (a publisher, whose readers come each version).
  // False: only when asked.
  bool keep_tables_fresh = true;
};

// Sums tables on its own threads; begin_write() stops them first. begin_write/end_write from one
// thread, the rest internal. Outlived by `transport`, `control` and the memory.
class ServedWeights {
 public:
  static Result<std::unique_ptr<ServedWeights>> open(Transport& transport, Control& control,
                                                     const Layout& layout, BoundMemory memory,
                                                     const ServedWeightsOptions& options);
  ~ServedWeights();
  ServedWeights(const ServedWeights&) = delete;
  ServedWeights& operator=(const ServedWeights&) = delete;

  uint64_t incarnation() const { return incarnation_; }
  const BoundMemory& memory() const { return memory_; }
  Result<std::string> descriptor(const std::string& token);  // encoded MemberDescriptor

  // Answers table requests for `member` from now on, until stop_serving().
  void serve(MemberId member);
  void stop_serving();

  // The counter becomes odd: whatever a peer reads from here on is torn. Waits for sums in progress
  // (at most a chunk each).
  void begin_write();
  // The counter becomes even: the weights are those of the generation that is returned.
  Generation end_write();

 private:
  // One table under construction or complete. The plan names the runs; this layout is number `own`
  // of its source layouts.
  struct Table {
    Digest key;
    CopyTable copies;
    uint32_t own = 0;
    std::unique_ptr<LocalRegion> region;
    uint32_t next_chunk = 0;  // to be summed
    uint32_t chunks_in_flight = 0;
    bool wanted = false;         // sums are due for the current generation
    uint32_t versions_left = 0;  // dropped when no reader asked again for so many versions
  };

  ServedWeights(Transport& transport, Control& control, const Layout& layout, BoundMemory memory,
                const ServedWeightsOptions& options);
  void event_loop(MemberId member);
  void sum_loop();
  Result<void> add_table(MemberId member, const TableRequest& request);
  std::string known_table(const TableRequest& request);  // its region, "" if there is none yet
  void announce_tables(MemberId member);
  void want(Table& table) REQUIRES(mutex_);
  void make_room_for_table() REQUIRES(mutex_);
  Table* next_table() REQUIRES(mutex_);
  void sum_chunk(const Table& table, const Chunk& chunk) const;
  void drop_stale_tables() REQUIRES(mutex_);
  GenerationWords& words() const;  // in registered memory

  Transport& transport_;
  Control& control_;
  const Layout layout_;
  const BoundMemory memory_;
  const ServedWeightsOptions options_;
  const uint64_t incarnation_;
  std::unique_ptr<LocalRegion> control_region_;
  std::atomic<bool> stopping_{false};
  std::thread event_thread_;
  std::vector<std::thread> sum_threads_;

  Mutex mutex_;
  CondVar changed_;
  bool writing_ GUARDED_BY(mutex_) = true;   // nothing published yet
  uint64_t counter_ GUARDED_BY(mutex_) = 0;  // of the last end_write()
  uint32_t chunks_in_flight_ GUARDED_BY(mutex_) = 0;
  std::vector<std::unique_ptr<Table>> tables_ GUARDED_BY(mutex_);
};

}  // namespace transfuse
