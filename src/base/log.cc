// The log: spdlog to standard error, level from the environment.
#include "base/log.h"

#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <string_view>
#include <utility>

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

namespace transfuse {
namespace {

spdlog::logger& logger() {
  // Leaked on purpose: threads may log while the process exits.
  static spdlog::logger* const instance = [] {
    auto* made = new spdlog::logger("transfuse", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    const char* level = std::getenv("TRANSFUSE_LOG");
    made->set_level(level == nullptr ? spdlog::level::warn : spdlog::level::from_str(level));
    made->set_pattern("%Y-%m-%dT%H:%M:%S.%f %P %l %v");
    return made;
  }();
  return *instance;
}

spdlog::level::level_enum spdlog_level(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarn:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::err;
}

// A value is quoted where it would not be one word; nothing in it ends the line.
void append_value(std::string& line, std::string_view value) {
  const bool plain = value.find_first_of(" \"\\=\n\r\t") == value.npos;
  if (plain) {
    line.append(value);
    return;
  }
  line.push_back('"');
  for (const char c : value) {
    if (c == '"' || c == '\\') line.push_back('\\');
    if (c == '\n' || c == '\r') {
      line.append("\\n");
    } else {
      line.push_back(c);
    }
  }
  line.push_back('"');
}

}  // namespace

void log_event(LogLevel level, std::string_view event,
               std::initializer_list<std::pair<std::string_view, std::string>> fields) {
  const auto spdlog_at = spdlog_level(level);
  if (!logger().should_log(spdlog_at)) return;
  std::string line(event);
  for (const auto& [key, value] : fields) {
    if (value.empty()) continue;
    line.append(" ").append(key).append("=");
    append_value(line, value);
  }
  logger().log(spdlog_at, "{}", line);
}

}  // namespace transfuse
