// Options of the commands that ask a running job.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "rpc/rpc.h"
#include "transfuse/control.h"
#include "transfuse/result.h"

namespace transfuse {

struct JobOptions {
  std::string job;
  std::string address;
  std::string token_file;
};

void add_job_options(CLI::App& command, JobOptions& options);

// A job that runs: these commands start no coordinator that nobody else would use.
struct Job {
  CoordinatorInfo coordinator;
  std::unique_ptr<Control> control;
};
// kNotFound: no coordinator runs.
Result<Job> open_job(const JobOptions& options);

// `wanted`, or the only model of the job. kNotFound, kInvalidArgument: there is none, or several.
Result<std::string> choose_model(Control& control, const std::string& wanted);

}  // namespace transfuse
