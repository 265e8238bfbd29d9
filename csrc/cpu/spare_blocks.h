// Memory for the large buffers that every step needs and frees again: gradients, chunks of logits.
//
// Fresh memory of that size costs a page fault every 4 KB when it is first written, several times as
// long as computing what goes there. So the blocks freed last are kept for the next requests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace em_kernels::cpu {

class SpareBlocks {
 public:
  struct Block {
    void* start = nullptr;
    size_t bytes = 0;
    int passed = 0;  // how many blocks have been given since this one was
  };

  // A block of at least `bytes`, its contents unspecified. Throws std::bad_alloc.
  Block take(size_t bytes) {
    {
      std::lock_guard<std::mutex> guard(lock_);
      auto best = spare_.end();
      for (auto it = spare_.begin(); it != spare_.end(); ++it) {
        const bool fits = it->bytes >= bytes && it->bytes <= kMostTimes * bytes;
        if (fits && (best == spare_.end() || it->bytes < best->bytes)) best = it;
      }
      if (best != spare_.end()) {
        const Block block = *best;
        spare_.erase(best);
        return block;
      }
    }
    return allocate((bytes + kPage - 1) / kPage * kPage);
  }

  // Takes a block back, in place of the one in store for longest where there are enough. One that
  // was not wanted for many steps is given up.
  void give(Block block) { keep(block, kMostBlocks); }

  // Gives the blocks in store back to the system.
  void clear() { keep({}, 0); }

 private:
  static constexpr size_t kPage = 2 << 20;
  static constexpr size_t kMostTimes = 4;  // a block this many times too large is not given out
  static constexpr size_t kMostBlocks = 3;
  static constexpr int kMostPassed = 16;

  static Block allocate(size_t bytes) {
    const Block block{::operator new(bytes, std::align_val_t{kPage}), bytes};
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(block.start, bytes, MADV_HUGEPAGE);
#endif
    return block;
  }

  void keep(Block block, size_t most) {
    std::vector<Block> released;
    {
      std::lock_guard<std::mutex> guard(lock_);
      for (Block& spare : spare_) ++spare.passed;
      block.passed = 0;
      if (block.start) spare_.push_back(block);
      // The oldest come first, and have been passed most often.
      for (; spare_.size() > most || (!spare_.empty() && spare_.front().passed > kMostPassed);
           spare_.erase(spare_.begin()))
        released.push_back(spare_.front());
    }
    for (const Block& old : released) ::operator delete(old.start, std::align_val_t{kPage});
  }

  std::mutex lock_;
  std::vector<Block> spare_;  // newest last
};

}  // namespace em_kernels::cpu
