// Memory for the large buffers that every step needs and frees again: gradients, chunks of logits.
//
// Fresh memory of that size costs a page fault every 4 KB when it is first written, several times as
// long as computing what goes there. So the block freed last is kept for the next request.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace em_kernels::cpu {

class SpareBlock {
 public:
  struct Block {
    void* start = nullptr;
    size_t bytes = 0;
  };

  // A block of at least `bytes`, its contents unspecified. Throws std::bad_alloc.
  Block take(size_t bytes) {
    {
      std::lock_guard<std::mutex> guard(lock_);
      if (spare_.bytes >= bytes && spare_.bytes <= kMostTimes * bytes)
        return std::exchange(spare_, {});
    }
    return allocate((bytes + kPage - 1) / kPage * kPage);
  }

  // Takes a block back, in place of the one in store.
  void give(Block block) {
    {
      std::lock_guard<std::mutex> guard(lock_);
      std::swap(block, spare_);
    }
    release(block);
  }

  // Gives the block in store, if there is one, back to the system.
  void clear() { give({}); }

 private:
  static constexpr size_t kPage = 2 << 20;
  static constexpr size_t kMostTimes = 4;  // a block this many times too large is not given out

  static Block allocate(size_t bytes) {
    const Block block{::operator new(bytes, std::align_val_t{kPage}), bytes};
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(block.start, bytes, MADV_HUGEPAGE);
#endif
    return block;
  }

  static void release(Block block) {
    if (block.start) ::operator delete(block.start, std::align_val_t{kPage});
  }

  std::mutex lock_;
  Block spare_;
};

}  // namespace em_kernels::cpu
