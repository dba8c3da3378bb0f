// The generation of a source: two words beside the weights that tell a reader of another process,
// or of this one, whether what it read is of one version.
//
// Writer: begin (counter odd), write the weights, end (counter even). Reader: load, read the
// weights, load again. Two loads of one even counter mean that no write lies between them:
//  - the odd store comes before every store of the weights, so a reader that saw any of those finds
//    the odd counter, or a later one, in its second load;
//  - every store of the weights comes before the even store, so a reader that found it in its first
//    load sees all of them.
// Full fences order streaming stores too: on x86 a locked instruction drains the write-combining
// buffers; on Arm it is a `dmb ish`.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#define TRANSFUSE_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TRANSFUSE_TSAN 1
#endif
#endif

namespace transfuse {

// In registered memory, 8-byte aligned. The counter is odd while the weights are being written.
struct GenerationWords {
  uint64_t incarnation = 0;
  uint64_t counter = 0;
};
static_assert(sizeof(GenerationWords) == 16);
static_assert(std::atomic_ref<uint64_t>::is_always_lock_free);

// ThreadSanitizer does not model fences, and the counter's own ordering is enough for it.
inline void full_fence() {
#if !defined(TRANSFUSE_TSAN)
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

// Before the first store to the weights. An odd counter (the last write was given up) stays as it
// is. One writer at a time.
inline void begin_generation(GenerationWords& words) {
  std::atomic_ref<uint64_t> counter(words.counter);
  counter.store(counter.load(std::memory_order_relaxed) | 1, std::memory_order_seq_cst);
  full_fence();
}

// After the last store to the weights; returns the counter that readers are to find. Weights that
// other threads wrote must have been handed over to this one (joined, locked) before.
inline uint64_t end_generation(GenerationWords& words) {
  std::atomic_ref<uint64_t> counter(words.counter);
  const uint64_t even = (counter.load(std::memory_order_relaxed) | 1) + 1;
  full_fence();
  counter.store(even, std::memory_order_seq_cst);
  return even;
}

// Ordered before every later read of this thread; a second load after the weights were read is
// ordered after them.
inline GenerationWords load_generation(GenerationWords& words) {
  full_fence();
  GenerationWords loaded;
  loaded.counter = std::atomic_ref<uint64_t>(words.counter).load(std::memory_order_acquire);
  loaded.incarnation = std::atomic_ref<uint64_t>(words.incarnation).load(std::memory_order_acquire);
  return loaded;
}

}  // namespace transfuse
