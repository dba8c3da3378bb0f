// One line per event on standard error: level, event name, key=value pairs.
// TRANSFUSE_LOG=debug|info|warn|error|off chooses the least level that is shown.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

namespace transfuse {

enum class LogLevel { kDebug, kInfo, kWarn, kError };

// `event` is snake_case; a field without a value is left out. Safe to call from any thread; never from a hot path.
void log_event(LogLevel level, std::string_view event,
               std::initializer_list<std::pair<std::string_view, std::string>> fields = {});

}  // namespace transfuse
