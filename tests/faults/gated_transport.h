// A transport whose reads can be held at the door: makes "during a refit" a moment that a test
// chooses.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/mutex.h"
#include "transfuse/transport.h"

namespace transfuse::faults {

// What a read carries: weights, or the words beside them (generation, fingerprint tables).
enum class ReadKind : uint8_t { kWords, kWeights };

// Passes everything on. Safe to call from any thread.
class GatedTransport final : public Transport {
 public:
  // `on_held` is called on the thread whose read is held, before it waits.
  GatedTransport(std::unique_ptr<Transport> inner, std::function<void()> on_held);

  // The `number`th read of `kind` from now on (from 1) waits for open().
  void hold(ReadKind kind, uint64_t number);
  void open();
  // Of its regions: words that are mapped are read without a ticket.
  void pass(ReadKind kind);

  std::string_view kind() const override { return inner_->kind(); }
  Result<std::unique_ptr<LocalRegion>> allocate(uint64_t size_bytes) override {
    return inner_->allocate(size_bytes);
  }
  Result<std::unique_ptr<LocalRegion>> register_memory(std::span<std::byte> memory) override {
    return inner_->register_memory(memory);
  }
  Result<std::string> endpoint() override { return inner_->endpoint(); }
  Result<std::unique_ptr<Peer>> connect(std::string_view endpoint, std::string_view token,
                                        Deadline deadline) override;
  Result<TicketId> submit(const ReadRequest& request) override;
  TicketState poll(TicketId ticket) override { return inner_->poll(ticket); }
  bool wait_any(std::span<const TicketId> tickets, Deadline deadline) override {
    return inner_->wait_any(tickets, deadline);
  }
  uint64_t progress_bytes(TicketId ticket) override { return inner_->progress_bytes(ticket); }
  void cancel(TicketId ticket) override { inner_->cancel(ticket); }
  Result<void> finish(TicketId ticket) override { return inner_->finish(ticket); }
  TransportStats stats() const override { return inner_->stats(); }

 private:
  const std::unique_ptr<Transport> inner_;
  const std::function<void()> on_held_;
  Mutex mutex_;
  CondVar opened_;
  ReadKind kind_ GUARDED_BY(mutex_) = ReadKind::kWords;
  uint64_t until_held_ GUARDED_BY(mutex_) = 0;  // 0: nothing is held
  bool open_ GUARDED_BY(mutex_) = true;
};

}  // namespace transfuse::faults
