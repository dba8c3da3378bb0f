// An explanation as text for a terminal and as JSON for programs.
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "plan/explain_format.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

constexpr size_t kMaxColumns = 8;  // a matrix wider than a terminal becomes a list
constexpr size_t kMaxRows = 32;
constexpr size_t kListedPairs = 20;

void write_matrix(const Explanation& e, std::string& out) {
  std::map<std::pair<uint32_t, uint32_t>, uint64_t> bytes;
  for (const PairTraffic& pair : e.pairs) bytes[{pair.source, pair.target}] = pair.size_bytes;
  size_t name_width = 8;
  for (const std::string& name : e.sources) name_width = std::max(name_width, name.size());
  size_t width = 9;
  for (const std::string& name : e.targets) width = std::max(width, name.size());
  const std::vector<uint64_t> sent = sent_bytes(e);
  const std::vector<uint64_t> received = received_bytes(e);

  out += fmt::format("{:<{}}", "", name_width);
  for (const std::string& name : e.targets) out += fmt::format("  {:>{}}", name, width);
  out += fmt::format("  {:>9}\n", "sent");
  for (uint32_t s = 0; s < e.sources.size(); ++s) {
    out += fmt::format("{:<{}}", e.sources[s], name_width);
    for (uint32_t t = 0; t < e.targets.size(); ++t) {
      const auto found = bytes.find({s, t});
      out +=
          fmt::format("  {:>{}}", found == bytes.end() ? "-" : spell_bytes(found->second), width);
    }
    out += fmt::format("  {:>9}\n", spell_bytes(sent[s]));
  }
  out += fmt::format("{:<{}}", "received", name_width);
  for (const uint64_t sum : received) out += fmt::format("  {:>{}}", spell_bytes(sum), width);
  out += fmt::format("  {:>9}\n", spell_bytes(e.total_bytes));
}

void write_largest_pairs(const Explanation& e, std::string& out) {
  std::vector<PairTraffic> pairs = e.pairs;
  const size_t listed = std::min(pairs.size(), kListedPairs);
  std::partial_sort(pairs.begin(), pairs.begin() + static_cast<std::ptrdiff_t>(listed), pairs.end(),
                    [](const PairTraffic& a, const PairTraffic& b) {
                      return std::tuple(b.size_bytes, a.source, a.target) <
                             std::tuple(a.size_bytes, b.source, b.target);
                    });
  out += fmt::format("the largest {} of {} pairs:\n", listed, spell_count(pairs.size()));
  for (size_t i = 0; i < listed; ++i) {
    out += fmt::format("  {} -> {}  {}  in {} runs\n", e.sources[pairs[i].source],
                       e.targets[pairs[i].target], spell_bytes(pairs[i].size_bytes),
                       spell_count(pairs[i].run_count));
  }
}

void write_run_lengths(const Explanation& e, std::string& out) {
  uint64_t most = 1;
  for (const RunLengthBucket& bucket : e.run_lengths) most = std::max(most, bucket.size_bytes);
  out += "contiguous bytes at the source:\n";
  for (const RunLengthBucket& bucket : e.run_lengths) {
    const double share = 100.0 * static_cast<double>(bucket.size_bytes) /
                         static_cast<double>(std::max<uint64_t>(1, e.total_bytes));
    const auto bar = static_cast<size_t>(30 * static_cast<double>(bucket.size_bytes) /
                                         static_cast<double>(most));
    out += fmt::format("  from {:>8}  {:>11} pieces  {:>8}  {:5.1f} %  {}\n",
                       spell_length(bucket.min_bytes), spell_count(bucket.piece_count),
                       spell_bytes(bucket.size_bytes), share, std::string(bar, '#'));
  }
}

}  // namespace

std::string Explanation::to_text() const {
  uint64_t runs = 0;
  for (const PairTraffic& pair : pairs) runs += pair.run_count;
  std::string out =
      fmt::format("{} source{} -> {} target{}: {} read, {} pairs, {} runs\n\n", sources.size(),
                  sources.size() == 1 ? "" : "s", targets.size(), targets.size() == 1 ? "" : "s",
                  spell_bytes(total_bytes), spell_count(pairs.size()), spell_count(runs));
  if (targets.size() <= kMaxColumns && sources.size() <= kMaxRows) {
    write_matrix(*this, out);
  } else {
    write_largest_pairs(*this, out);
  }
  out += "\n";
  write_run_lengths(*this, out);
  out += "\nbound: " + spell_bound(*this) + "\n";
  return out;
}

std::string Explanation::to_json() const {
  nlohmann::ordered_json json;
  json["sources"] = sources;
  json["targets"] = targets;
  json["total_bytes"] = total_bytes;
  json["bound"] = {{"link", busiest_link},
                   {"size_bytes", bound_bytes(*this)},
                   {"busiest_source_bytes", busiest_source_bytes},
                   {"busiest_target_bytes", busiest_target_bytes}};
  json["pairs"] = nlohmann::ordered_json::array();
  for (const PairTraffic& pair : pairs) {
    json["pairs"].push_back({{"source", pair.source},
                             {"target", pair.target},
                             {"size_bytes", pair.size_bytes},
                             {"run_count", pair.run_count}});
  }
  json["run_lengths"] = nlohmann::ordered_json::array();
  for (const RunLengthBucket& bucket : run_lengths) {
    json["run_lengths"].push_back({{"min_bytes", bucket.min_bytes},
                                   {"piece_count", bucket.piece_count},
                                   {"size_bytes", bucket.size_bytes}});
  }
  // Names come from users: what is not UTF-8 is replaced, not thrown over.
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace transfuse
