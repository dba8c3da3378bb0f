// `transfuse inspect`: what a checkpoint or a layout holds, per tensor and summed.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>
#include <vector>

#include "command.h"
#include "read_file.h"
#include "text_table.h"
#include "transfuse/checkpoint.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

struct Arguments {
  std::string what;
  std::string config;
  bool json = false;
};

// One tensor of a file, or one parameter of a rank.
struct Row {
  std::string name;
  std::string dtype;
  Dims shape;
  uint64_t size_bytes = 0;
  uint64_t fill_bytes = 0;  // zeros that no tensor of the catalog covers
  size_t holder = 0;
};
struct Inspection {
  std::string holder_kind;           // "file" or "rank"
  std::vector<std::string> holders;  // names
  std::vector<Row> rows;
  uint64_t version = 0;  // of the weights, as all files record it; 0: they do not
};

Result<Inspection> inspect_checkpoint(const std::string& path) {
  TRANSFUSE_ASSIGN_OR_RETURN(const CheckpointListing listing, list_checkpoint(path));
  Inspection inspection{.holder_kind = "file", .holders = {}, .rows = {}};
  for (const StoredFile& file : listing.files) {
    inspection.holders.push_back(std::filesystem::path(file.path).filename().string());
  }
  const bool same =
      std::ranges::adjacent_find(listing.versions, std::not_equal_to()) == listing.versions.end();
  if (same && !listing.versions.empty()) inspection.version = listing.versions[0];
  for (const StoredTensor& tensor : listing.tensors) {
    inspection.rows.push_back({.name = tensor.name,
                               .dtype = tensor.dtype_text,
                               .shape = tensor.shape,
                               .size_bytes = tensor.size_bytes,
                               .holder = tensor.file});
  }
  return inspection;
}

Result<Inspection> inspect_spec(const Arguments& arguments) {
  if (arguments.config.empty()) {
    return Error{ErrorCode::kInvalidArgument,
                 arguments.what + ": no such file or folder; a layout needs --config"};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string text, read_file(arguments.config));
  TRANSFUSE_ASSIGN_OR_RETURN(const ModelConfig config, parse_model_config(text));
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec spec, read_parallel_spec(arguments.what));
  TRANSFUSE_ASSIGN_OR_RETURN(const std::vector<Layout> layouts, make_layouts(config, spec));
  Inspection inspection{.holder_kind = "rank", .holders = {}, .rows = {}};
  for (size_t rank = 0; rank < layouts.size(); ++rank) {
    const Layout& layout = layouts[rank];
    inspection.holders.push_back(spec.family + "." + std::to_string(rank));
    const std::vector<Dims> shapes = parameter_shapes(layout);
    const size_t first = inspection.rows.size();
    for (size_t i = 0; i < shapes.size(); ++i) {
      const ParameterSpec& parameter = layout.parameters()[i];
      inspection.rows.push_back({.name = parameter.name,
                                 .dtype = std::string(dtype_name(parameter.dtype)),
                                 .shape = shapes[i],
                                 .size_bytes = static_cast<uint64_t>(parameter.element_count) *
                                               dtype_size_bytes(parameter.dtype),
                                 .holder = rank});
    }
    for (const Fill& fill : layout.fills()) {
      inspection.rows[first + fill.parameter].fill_bytes +=
          static_cast<uint64_t>(fill.length.product()) *
          dtype_size_bytes(layout.parameters()[fill.parameter].dtype);
    }
  }
  return inspection;
}

struct Sum {
  uint64_t tensor_count = 0;
  uint64_t size_bytes = 0;
  uint64_t fill_bytes = 0;
  void add(const Row& row) {
    ++tensor_count;
    size_bytes += row.size_bytes;
    fill_bytes += row.fill_bytes;
  }
};
struct Sums {
  std::vector<Sum> holders;
  std::map<std::string, Sum> dtypes;
  Sum all;
};
Sums sum_up(const Inspection& inspection) {
  Sums sums;
  sums.holders.resize(inspection.holders.size());
  for (const Row& row : inspection.rows) {
    sums.holders[row.holder].add(row);
    sums.dtypes[row.dtype].add(row);
    sums.all.add(row);
  }
  return sums;
}

void print_text(const Inspection& inspection) {
  TextTable table({"tensor", "dtype", "shape", "bytes", "zeros", inspection.holder_kind});
  for (const Row& row : inspection.rows) {
    table.add({row.name, row.dtype, row.shape.to_string(), std::to_string(row.size_bytes),
               std::to_string(row.fill_bytes), inspection.holders[row.holder]});
  }
  std::printf("%s\n", table.to_text().c_str());
  const Sums sums = sum_up(inspection);
  TextTable summary({"", "tensors", "bytes", "zeros"});
  const auto add = [&summary](const std::string& name, const Sum& sum) {
    summary.add({name, std::to_string(sum.tensor_count), std::to_string(sum.size_bytes),
                 std::to_string(sum.fill_bytes)});
  };
  for (size_t i = 0; i < sums.holders.size(); ++i) add(inspection.holders[i], sums.holders[i]);
  for (const auto& [dtype, sum] : sums.dtypes) add(dtype, sum);
  add("all", sums.all);
  std::printf("%s", summary.to_text().c_str());
  if (inspection.version > 0) {
    std::printf("version %llu\n", static_cast<unsigned long long>(inspection.version));
  }
}

nlohmann::ordered_json to_json(const Sum& sum) {
  return {{"tensor_count", sum.tensor_count},
          {"size_bytes", sum.size_bytes},
          {"fill_bytes", sum.fill_bytes}};
}

void print_json(const Inspection& inspection) {
  nlohmann::ordered_json body;
  body["tensors"] = nlohmann::ordered_json::array();
  for (const Row& row : inspection.rows) {
    body["tensors"].push_back({{"name", row.name},
                               {"dtype", row.dtype},
                               {"shape", row.shape.values()},
                               {"size_bytes", row.size_bytes},
                               {"fill_bytes", row.fill_bytes},
                               {inspection.holder_kind, inspection.holders[row.holder]}});
  }
  const Sums sums = sum_up(inspection);
  auto& holders = body[inspection.holder_kind + "s"] = nlohmann::ordered_json::object();
  for (size_t i = 0; i < sums.holders.size(); ++i) {
    holders[inspection.holders[i]] = to_json(sums.holders[i]);
  }
  auto& dtypes = body["dtypes"] = nlohmann::ordered_json::object();
  for (const auto& [dtype, sum] : sums.dtypes) dtypes[dtype] = to_json(sum);
  body["all"] = to_json(sums.all);
  if (inspection.version > 0) body["version"] = inspection.version;
  std::printf("%s\n", body.dump(2).c_str());
}

Result<void> run_inspect(const Arguments& arguments) {
  std::error_code error;
  const bool on_disk = std::filesystem::exists(arguments.what, error);
  TRANSFUSE_ASSIGN_OR_RETURN(const Inspection inspection, on_disk
                                                              ? inspect_checkpoint(arguments.what)
                                                              : inspect_spec(arguments));
  if (arguments.json) {
    print_json(inspection);
  } else {
    print_text(inspection);
  }
  return {};
}

}  // namespace

void add_inspect_command(CLI::App& app, CommandContext& context) {
  auto arguments = std::make_shared<Arguments>();  // shared with the callback
  CLI::App* command = app.add_subcommand(
      "inspect", "Show what a checkpoint or a layout holds, per tensor and summed");
  command
      ->add_option("what", arguments->what,
                   "A safetensors file, a checkpoint folder, or a layout such as vllm:tp=2")
      ->required();
  command->add_option("--config", arguments->config, "config.json of the model, for a layout")
      ->check(CLI::ExistingFile);
  command->add_flag("--json", arguments->json, "JSON to stdout");
  command->footer(R"(Reads headers alone, and checks them.

Examples:
  transfuse inspect model.safetensors
  transfuse inspect checkpoint-folder --json
  transfuse inspect fsdp:dp=3 --config config.json)");
  command->callback([&context, arguments] {
    context.run = [arguments] {
      const Result<void> outcome = run_inspect(*arguments);
      return outcome ? static_cast<int>(kExitOk) : report_failure(outcome.error(), arguments->json);
    };
  });
}

}  // namespace transfuse
