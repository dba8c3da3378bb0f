// Finding the coordinator of a job, and the model that a command is about.
#include "job.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <set>
#include <string>

#include "rpc/rpc.h"
#include "transfuse/control.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse {

void add_job_options(CLI::App& command, JobOptions& options) {
  command.add_option("--job", options.job, "The job whose coordinator to ask [$TRANSFUSE_JOB]");
  command.add_option("--address", options.address,
                     "A coordinator started by hand: unix:/path or host:port");
  command
      .add_option("--token-file", options.token_file, "Its first line is what --address asks for")
      ->check(CLI::ExistingFile);
}

Result<Job> open_job(const JobOptions& options) {
  ConnectOptions connect;
  connect.job = options.job;
  connect.address = options.address;
  if (!options.token_file.empty()) {
    std::ifstream file(options.token_file);
    if (!std::getline(file, connect.token)) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("no token can be read from {}", options.token_file)};
    }
  }
  Job job;
  TRANSFUSE_ASSIGN_OR_RETURN(job.coordinator, find_coordinator(connect));
  TRANSFUSE_ASSIGN_OR_RETURN(job.control, connect_control(connect));
  return job;
}

Result<std::string> choose_model(Control& control, const std::string& wanted) {
  if (!wanted.empty()) return wanted;
  std::set<std::string> models;
  TRANSFUSE_ASSIGN_OR_RETURN(const auto members, control.members(""));
  for (const MemberInfo& member : members) models.insert(member.model);
  TRANSFUSE_ASSIGN_OR_RETURN(const auto versions, control.versions(""));
  for (const VersionInfo& version : versions) models.insert(version.model);
  if (models.size() == 1) return *models.begin();
  std::string names;
  for (const std::string& model : models) names += (names.empty() ? "" : ", ") + model;
  if (models.empty()) return Error{ErrorCode::kNotFound, "the job has no model"};
  return Error{ErrorCode::kInvalidArgument,
               fmt::format("the job has several models, choose one with --model: {}", names)};
}

}  // namespace transfuse
