// Plain data of the simulation: what memory holds, what goes wrong on purpose, what is counted.
#pragma once

#include <array>
#include <chrono>
#include <compare>
#include <cstddef>
#include <cstdint>

#include "transfuse/deadline.h"
#include "transfuse/versions.h"

namespace transfuse::sim {

// Stands for the bytes of one chunk: which process wrote them, for which version.
struct Stamp {
  uint64_t incarnation = 0;
  uint64_t run = 0;  // of the job, which may count from below when it restarts
  uint64_t version = 0;
  uint64_t serial = 0;  // of the write: the same version is never written twice alike
  auto operator<=>(const Stamp&) const = default;
};
inline constexpr size_t kChunks = 2;  // of a slot; a write and a read of it take several events
using Chunks = std::array<Stamp, kChunks>;

struct Slot {
  Generation generation;
  Chunks chunks{};
  uint64_t offered = 0;  // the version that it was published with; 0: none
};

// A part of Transfuse that is broken on purpose, to see that the judge says so.
enum class Canary : uint8_t {
  kNone,
  kLeaseOnReplaced,        // a lease names a version that its source has replaced
  kLeaseForgottenByDrain,  // begin_write() does not wait for one reader
  kDecisionSplit,          // one rank is told ABORT of a round that was committed
  kGenerationIgnored,      // readers do not look at the generation
};

// Times of the coordinator, short so that a life of seconds has many of them.
inline constexpr Duration kTtl = std::chrono::milliseconds(1000);
inline constexpr Duration kLeaseTtl = std::chrono::milliseconds(1500);
inline constexpr Duration kGrace = std::chrono::milliseconds(100);
inline constexpr Duration kLate = std::chrono::milliseconds(40);  // a timer, at most
inline constexpr Duration kRecovery = std::chrono::seconds(10);   // of a round, at most

struct Counts {
  uint64_t events = 0;
  uint64_t refits = 0;          // of single targets
  uint64_t commits = 0;         // told to a rank
  uint64_t aborts = 0;          // told to a rank
  uint64_t unknown = 0;         // decisions that a rank could not learn
  uint64_t whole = 0;           // changes of version that every rank of a group confirmed
  uint64_t broken = 0;          // a group became BROKEN
  uint64_t revoked = 0;         // leases
  uint64_t skipped = 0;         // versions
  uint64_t waited_in_vain = 0;  // begin_write() with kWait
  uint64_t restarts = 0;        // of the coordinator
  uint64_t resumed = 0;         // members that came back to a coordinator
  uint64_t recovered = 0;       // told COMMIT by another coordinator than the one that recorded it
  uint64_t torn = 0;            // reads that the generation exposed
  uint64_t torn_in_fact = 0;    // of them, those whose bytes differ
  uint64_t lost = 0;            // messages
  uint64_t kills = 0;
  uint64_t pauses = 0;
  uint64_t jumps = 0;  // of a clock
  void add(const Counts& other);
};

}  // namespace transfuse::sim
