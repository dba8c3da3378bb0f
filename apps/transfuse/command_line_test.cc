// Runs the real executable: exit codes, help, and the doctor's view of this host.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>

namespace transfuse {
namespace {

struct Outcome {
  int exit_code = -1;
  std::string output;  // stdout and stderr
};

Outcome run(const std::string& arguments) {
  FILE* pipe = popen((std::string(TRANSFUSE_EXECUTABLE) + " " + arguments + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return {};
  Outcome outcome;
  std::array<char, 4096> buffer;
  for (size_t size = 0; (size = fread(buffer.data(), 1, buffer.size(), pipe)) > 0;)
    outcome.output.append(buffer.data(), size);
  const int status = pclose(pipe);
  outcome.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return outcome;
}

TEST(CommandLine, VersionGoesToStdoutWithSuccess) {
  const Outcome outcome = run("--version");
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_EQ(outcome.output.rfind("transfuse ", 0), 0u) << outcome.output;
}

TEST(CommandLine, AWrongCommandLineEndsWithTwo) {
  EXPECT_EQ(run("").exit_code, 2);
  EXPECT_EQ(run("no-such-command").exit_code, 2);
  EXPECT_EQ(run("doctor --no-such-option").exit_code, 2);
}

TEST(CommandLine, HelpDocumentsExitCodesAndShowsExamples) {
  const Outcome help = run("--help");
  EXPECT_EQ(help.exit_code, 0);
  EXPECT_NE(help.output.find("Exit codes"), std::string::npos);
  const Outcome doctor = run("doctor --help");
  EXPECT_EQ(doctor.exit_code, 0);
  EXPECT_NE(doctor.output.find("Examples"), std::string::npos);
}

TEST(Doctor, JsonSaysFitExactlyWhenNothingIsMissing) {
  const Outcome outcome = run("doctor --json");
  const auto body = nlohmann::json::parse(outcome.output);
  bool missing = false;
  for (const auto& check : body.at("checks")) {
    missing |= check.at("outcome") == "missing";
    EXPECT_FALSE(check.at("found").get<std::string>().empty()) << check;
    if (check.at("outcome") != "ok") {
      EXPECT_FALSE(check.at("remedy").get<std::string>().empty()) << check;
    }
  }
  EXPECT_GE(body.at("checks").size(), 8u);
  EXPECT_EQ(body.at("fit").get<bool>(), !missing);
  EXPECT_EQ(outcome.exit_code, missing ? 3 : 0);
}

TEST(Bench, ADeviceThatIsNoneIsATypedError) {
  for (const char* device : {"gpu", "cuda:", "cuda:-1", "cuda:0x", "cuda:99"}) {
    const Outcome outcome = run(std::string("bench --tiny --device ") + device);
    EXPECT_EQ(outcome.exit_code, 1) << outcome.output;
    EXPECT_TRUE(outcome.output.find("INVALID_ARGUMENT") != std::string::npos ||
                outcome.output.find("UNSUPPORTED") != std::string::npos)
        << outcome.output;
  }
}

TEST(Doctor, SaysWhichTransportsAreNotInThisBuild) {
  const Outcome outcome = run("doctor");
  EXPECT_NE(outcome.output.find("shm"), std::string::npos);
  EXPECT_NE(outcome.output.find("not in this build"), std::string::npos);
}

}  // namespace
}  // namespace transfuse
