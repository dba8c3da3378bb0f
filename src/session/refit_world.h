// For tests: trainers and one engine in one process, over any transport, on real model layouts.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "session/known_weights.h"
#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/transport.h"

namespace transfuse::testing {

template <typename T>
T value_or_fail(Result<T> result, const char* what) {
  if (!result) {
    ADD_FAILURE() << what << ": " << result.error().to_string();
    std::abort();
  }
  return std::move(result).value();
}

struct Trainer {
  Trainer(Transport& transport, Control& control, const Layout& layout, std::string name,
          uint32_t count, int64_t drain_ms = 5000)
      : Trainer(transport, control, layout, [&] {
          PublisherOptions options;
          options.name = std::move(name);
          options.source_count = count;
          options.drain_ms = drain_ms;
          options.fingerprint_threads = 1;
          return options;
        }()) {}
  Trainer(Transport& transport, Control& control, const Layout& layout,
          const PublisherOptions& options)
      : parameters(layout),
        publisher(
            value_or_fail(Publisher::open(transport, control, layout, parameters.memory(), options),
                          "publisher")) {}
  void publish(uint64_t version) {
    const auto published = try_publish(version);
    ASSERT_TRUE(published) << published.error().to_string();
    ASSERT_FALSE(published->skipped);
  }
  Result<PublishTiming> try_publish(uint64_t version) {
    TRANSFUSE_ASSIGN_OR_RETURN(const WriteTiming begun, publisher->begin_write(version));
    (void)begun;
    parameters.write(version);
    return publisher->publish(version);
  }
  Parameters parameters;
  std::unique_ptr<Publisher> publisher;
};

struct Engine {
  Engine(Transport& transport, Control& control, const Layout& layout, std::string name = "engine0",
         ReceiverOptions options = {})
      : parameters(layout) {
    options.name = std::move(name);
    parameters.poison(std::byte{0xEE});
    receiver = value_or_fail(
        Receiver::open(transport, control, layout, parameters.memory(), options), "receiver");
  }
  Result<RefitReport> refit(const VersionRequest& request = {}, int64_t deadline_ms = 10000) {
    return receiver->refit(request, Deadline::after_ms(deadline_ms));
  }
  Parameters parameters;
  std::unique_ptr<Receiver> receiver;
};

inline std::vector<Layout> layouts(std::string_view spec) {
  return value_or_fail(
      make_layouts(small_model(), value_or_fail(parse_parallel_spec(spec), "spec")), "layouts");
}

}  // namespace transfuse::testing
