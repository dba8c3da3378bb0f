// Counts every operator new of the program that it is linked into.
#include "conformance/allocation_count.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {
std::atomic<uint64_t> count{0};
}  // namespace

// The array and nothrow forms end in these.
void* operator new(size_t size) {
  count.fetch_add(1, std::memory_order_relaxed);
  void* memory = std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t /*size*/) noexcept { std::free(memory); }

namespace transfuse::conformance {

uint64_t allocation_count() { return count.load(std::memory_order_relaxed); }

}  // namespace transfuse::conformance
