// A thread that cannot be started is an error, not the end of the process.
#include "base/thread.h"

#include <gtest/gtest.h>
#include <pthread.h>

#include <atomic>
#include <cstddef>

namespace transfuse {
namespace {

TEST(StartThread, RunsTheBody) {
  std::atomic<int> ran{0};
  auto thread = start_thread("test", [&ran] { ran = 7; });
  ASSERT_TRUE(thread);
  thread->join();
  EXPECT_EQ(ran, 7);
}

// In a process of its own: the default stack size is for good.
TEST(StartThread, ThreadWithoutRoomIsATypedErrorThatNamesIt) {
  const auto attempt = [] {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, size_t{1} << 55);  // beyond any address space
    if (pthread_setattr_default_np(&attributes) != 0) _exit(3);
    const auto thread = start_thread("fingerprint", [] {});
    if (thread) _exit(4);
    const bool named = thread.error().code == ErrorCode::kResourceExhausted &&
                       thread.error().message.find("fingerprint") != std::string::npos;
    _exit(named ? 0 : 5);
  };
  EXPECT_EXIT(attempt(), ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace transfuse
