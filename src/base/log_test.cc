// Lines of the log, read back.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "base/log.h"

namespace transfuse {
namespace {

using testing::EndsWith;
using testing::HasSubstr;

std::string logged(LogLevel level, const std::string& value) {
  testing::internal::CaptureStderr();
  log_event(level, "something_happened", {{"name", "engine0"}, {"reason", value}});
  return testing::internal::GetCapturedStderr();
}

TEST(Log, AnEventIsOneLineWhateverItsValues) {
  EXPECT_THAT(logged(LogLevel::kWarn, "short"),
              EndsWith("warning something_happened name=engine0 reason=short\n"));
  EXPECT_THAT(logged(LogLevel::kError, "two words"), EndsWith("reason=\"two words\"\n"));
  EXPECT_THAT(logged(LogLevel::kWarn, ""), EndsWith("something_happened name=engine0\n"));
  const std::string line = logged(LogLevel::kWarn, "a \"quoted\"\nsecond line");
  EXPECT_THAT(line, EndsWith("reason=\"a \\\"quoted\\\"\\nsecond line\"\n"));
  EXPECT_EQ(line.find('\n'), line.size() - 1);
}

TEST(Log, WhatIsBelowTheLevelIsNotWritten) {
  if (std::getenv("TRANSFUSE_LOG") != nullptr) GTEST_SKIP() << "TRANSFUSE_LOG is set";
  EXPECT_EQ(logged(LogLevel::kDebug, "x"), "");
  EXPECT_EQ(logged(LogLevel::kInfo, "x"), "");
}

}  // namespace
}  // namespace transfuse
