// Thousands of random lives of the control plane, each fixed by its seed, judged after every event.
//
//   TRANSFUSE_SIM_SEED=N    begins with seed N (of a failure: it is printed)
//   TRANSFUSE_SIM_SEEDS=N   so many lives instead of the default
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <set>
#include <string>

#include "sim/facts.h"
#include "sim/world.h"

namespace transfuse::sim {
namespace {

uint64_t from_environment(const char* name, uint64_t otherwise) {
  const char* given = std::getenv(name);
  return given != nullptr ? std::stoull(given) : otherwise;
}

// The same life again, for what happened last.
std::string retold(uint64_t seed, const World::Options& options) {
  World world(seed, {.canary = options.canary, .trace = true});
  const auto faults = world.live();
  std::string out;
  for (const std::string& event : world.last_events()) out += event + "\n";
  for (const std::string& fault : faults) out += fault + "\n";
  return out + "TRANSFUSE_SIM_SEED=" + std::to_string(seed) + " TRANSFUSE_SIM_SEEDS=1\n";
}

TEST(Simulation, EverySeedKeepsI3I4I8I9I11AndRecovers) {
  const uint64_t first = from_environment("TRANSFUSE_SIM_SEED", 1);
  const uint64_t count = from_environment("TRANSFUSE_SIM_SEEDS", 2000);
  Counts all;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    World world(seed, {});
    const auto faults = world.live();
    ASSERT_TRUE(faults.empty()) << retold(seed, {});
    all.add(world.counts());
  }
  std::cout << all.events << " events\n";
  if (count < 100) return;  // too few for everything to have happened
  EXPECT_GT(all.refits, 0u);
  EXPECT_GT(all.commits, 0u);
  EXPECT_GT(all.aborts, 0u);
  EXPECT_GT(all.unknown, 0u);
  EXPECT_GT(all.whole, 0u);
  EXPECT_GT(all.broken, 0u);
  EXPECT_GT(all.revoked, 0u);
  EXPECT_GT(all.skipped, 0u);
  EXPECT_GT(all.waited_in_vain, 0u);
  EXPECT_GT(all.restarts, 0u);
  EXPECT_GT(all.resumed, 0u);
  EXPECT_GT(all.recovered, 0u);
  EXPECT_GT(all.torn, 0u);
  EXPECT_GT(all.torn_in_fact, 0u);
  EXPECT_GT(all.lost, 0u);
  EXPECT_GT(all.kills, 0u);
  EXPECT_GT(all.pauses, 0u);
  EXPECT_GT(all.jumps, 0u);
}

TEST(Simulation, ASeedFixesTheWholeLife) {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    World one(seed, {.trace = true});
    World other(seed, {.trace = true});
    EXPECT_EQ(one.live(), other.live());
    EXPECT_EQ(one.counts().events, other.counts().events);
    EXPECT_EQ(one.last_events(), other.last_events());
  }
}

// Whether the judge says so about one of the first lives.
testing::AssertionResult objects(Canary canary, const std::string& fault) {
  std::set<std::string> others;
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    for (const std::string& found : World(seed, {.canary = canary}).live()) {
      if (found == fault) return testing::AssertionSuccess();
      others.insert(found);
    }
  }
  auto failure = testing::AssertionFailure() << "nobody said '" << fault << "', but";
  for (const std::string& other : others) failure << " '" << other << "'";
  return failure;
}

TEST(Simulation, TheJudgeObjectsToALeaseOnAVersionThatWasReplaced) {
  EXPECT_TRUE(objects(Canary::kLeaseOnReplaced, "I8: a lease on a version that is not READY"));
}

TEST(Simulation, TheJudgeObjectsToADrainThatForgetsALease) {
  EXPECT_TRUE(objects(Canary::kLeaseForgottenByDrain,
                      "I8: a version ended and a reader of it was not told"));
}

TEST(Simulation, TheJudgeObjectsToADecisionThatIsNotTheSameForAll) {
  EXPECT_TRUE(objects(Canary::kDecisionSplit, "I8: two decisions about one round"));
}

TEST(Simulation, TheJudgeObjectsToReadersThatIgnoreTheGeneration) {
  EXPECT_TRUE(objects(Canary::kGenerationIgnored,
                      "I8: a refit succeeded with other bytes than those of its version"));
}

}  // namespace
}  // namespace transfuse::sim
