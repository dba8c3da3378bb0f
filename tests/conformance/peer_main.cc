// A process that can be read: does what it is told on standard input until that ends.
//   transfuse_peer <backend> <folder> <token>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <dirent.h>
#include <cstdio>

#include <iostream>
#include <string>
#include <utility>

#include "conformance/backends.h"
#include "conformance/peer_commands.h"

namespace {

// Of this process, without the one that counts.
int open_descriptors() {
  int count = 0;
  DIR* folder = opendir("/proc/self/fd");
  if (folder == nullptr) return -1;
  while (readdir(folder) != nullptr) ++count;
  closedir(folder);
  return count - 3;
}

}  // namespace

int main(int argc, char** argv) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // nothing stays behind a test that was killed
  if (argc != 4) return 2;
  auto transport = transfuse::conformance::open_backend(
      {.backend = argv[1], .folder = argv[2], .token = argv[3]});
  if (!transport) {
    std::cerr << transport.error().to_string() << "\n";
    return 1;
  }
  transfuse::conformance::PeerCommands commands(std::move(*transport), argv[1]);
  for (std::string line; std::getline(std::cin, line);) {
    std::cout << (line == "descriptors" ? "ok " + std::to_string(open_descriptors())
                                        : commands.answer(line))
              << std::endl;
  }
  return 0;
}
