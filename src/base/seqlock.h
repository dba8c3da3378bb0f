// The writer's and the reader's half of a generation word: how a torn read is found.
//
// Writer: begin (counter odd), fence, write the data, fence, end (counter even). Reader: load the
// counter, read the data, load it again. If both loads give the same even counter, then no write of
// the data lies between them:
//  - begin: the odd store comes before every later store of the data (release fence after it), so a
//  reader that sees any new data
//    and then, ordered by an acquire fence, loads the counter, sees the odd value or a later one;
//  - end: every store of the data comes before the even store (release), so a reader that loads the
//  even value first (acquire)
//    sees all the data of that generation.
// Streaming stores are not ordered by a release store on x86: end() issues an sfence before it.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace transfuse {

inline void store_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
  std::atomic_thread_fence(std::memory_order_release);
}

// `odd` must be above the counter's value.
inline void seqlock_begin(uint64_t& counter, uint64_t odd) {
  std::atomic_ref<uint64_t>(counter).store(odd, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

inline void seqlock_end(uint64_t& counter, uint64_t even) {
  store_fence();
  std::atomic_ref<uint64_t>(counter).store(even, std::memory_order_release);
}

// Before the data is read; the acquire keeps later reads after it.
inline uint64_t seqlock_load_first(uint64_t& counter) {
  return std::atomic_ref<uint64_t>(counter).load(std::memory_order_acquire);
}

// After the data was read; the fence keeps earlier reads before it.
inline uint64_t seqlock_load_second(uint64_t& counter) {
  std::atomic_thread_fence(std::memory_order_acquire);
  return std::atomic_ref<uint64_t>(counter).load(std::memory_order_relaxed);
}

}  // namespace transfuse
