// A source whose description of itself is not true.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "faults/weights.h"
#include "session/memory.h"
#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::faults {

// Holds version 1 of honest weights, joined and published by hand. Used from one thread; outlived
// by `transport` and `control`.
class Liar {
 public:
  // `lie` names what is wrong: see describe() in liar.cc.
  static Result<std::unique_ptr<Liar>> open(Transport& transport, Control& control,
                                            const Layout& layout, const std::string& name,
                                            const std::string& lie);
  ~Liar();
  // Waits for a reader that asks for fingerprints and answers with a table that is not true either:
  // "wrong_sums", "short", "garbage" or "unfinished".
  Result<void> answer_table(const std::string& lie);
  Liar(const Liar&) = delete;
  Liar& operator=(const Liar&) = delete;

 private:
  Liar(Transport& transport, Control& control) : transport_(transport), control_(control) {}
  Result<std::string> describe(const std::string& lie);

  Transport& transport_;
  Control& control_;
  std::unique_ptr<Weights> weights_;
  std::unique_ptr<BoundMemory> bound_;
  std::unique_ptr<LocalRegion> words_;
  std::unique_ptr<LocalRegion> hole_;  // registered, but nothing is mapped there
  std::unique_ptr<LocalRegion> table_;
  Generation generation_;
  MemberId member_{};
};

}  // namespace transfuse::faults
