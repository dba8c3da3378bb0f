// A trainer or engine process under the control of a test: answers requests on standard input until
// that ends.
//   transfuse_member <runtime folder> <job>
#include <signal.h>
#include <sys/prctl.h>

#include <deque>
#include <iostream>
#include <string>
#include <thread>
#include <utility>

#include "base/mutex.h"
#include "faults/member.h"

namespace {

using transfuse::faults::Json;

// Requests in the order in which they came.
class Inbox {
 public:
  void put(Json request) {
    const transfuse::MutexLock lock(mutex_);
    requests_.push_back(std::move(request));
    changed_.notify_all();
  }
  Json take() {
    const transfuse::MutexLock lock(mutex_);
    while (requests_.empty()) changed_.wait(mutex_);
    Json request = std::move(requests_.front());
    requests_.pop_front();
    return request;
  }

 private:
  transfuse::Mutex mutex_;
  transfuse::CondVar changed_;
  std::deque<Json> requests_ GUARDED_BY(mutex_);
};

void tell(const Json& line) {
  static transfuse::Mutex mutex;
  const transfuse::MutexLock lock(mutex);
  std::cout << line.dump() << std::endl;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // nothing stays behind a test that was killed
  transfuse::faults::Member member(argv[1], argv[2], tell);
  Inbox inbox;
  std::thread worker([&] {
    for (Json request = inbox.take(); !request.is_null(); request = inbox.take()) {
      Json answer = member.answer(request);
      answer["id"] = request["id"];
      tell(answer);
    }
  });
  for (std::string line; std::getline(std::cin, line);) {
    Json request = Json::parse(line);
    if (!member.interrupt(request)) inbox.put(std::move(request));
  }
  for (const char* const end : {"cancel", "go"}) (void)member.interrupt({{"do", end}});
  inbox.put(nullptr);
  worker.join();
  return 0;
}
