#include "cpu/buffer.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace alterrec {
namespace {

constexpr std::size_t kLine = 64, kPage = 4096, kHugePage = 2 << 20;
constexpr std::size_t kLarge = 128 << 10;  // smaller ones the C library keeps well enough
constexpr std::size_t kMostCached = 256 << 20;

// Under AddressSanitizer blocks end where they were asked to end, and none is used again.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

std::size_t round_up_to(std::size_t bytes, std::size_t to) { return (bytes + to - 1) / to * to; }

class Blocks {
 public:
  Blocks() { free_.reserve(256); }

  Block take(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      if (block->bytes < bytes || block->bytes / 2 > bytes) continue;  // too small, or a waste
      if (best == free_.end() || block->bytes <= best->bytes) best = block;
    }
    if (best == free_.end()) return {};
    const Block taken = *best;
    free_.erase(best);
    cached_bytes_ -= taken.bytes;
    return taken;
  }

  // Keeps the block, and frees the oldest ones where there are too many.
  void keep(Block block) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!free_.empty() && (cached_bytes_ + block.bytes > kMostCached || free_.size() == free_.capacity())) {
      cached_bytes_ -= free_.front().bytes;
      std::free(free_.front().data);
      free_.erase(free_.begin());
    }
    free_.push_back(block);
    cached_bytes_ += block.bytes;
  }

 private:
  std::mutex mutex_;
  std::vector<Block> free_;  // oldest first
  std::size_t cached_bytes_ = 0;
};

// Never destroyed: what holds a block may outlive any static object.
Blocks& blocks() {
  static Blocks* const all = new Blocks;
  return *all;
}

}  // namespace

Block take_block(std::size_t bytes) {
  if (kSanitized) {
    void* data = nullptr;
    if (posix_memalign(&data, kLine, bytes) != 0) throw std::bad_alloc();
    return {data, bytes};
  }
  if (bytes >= kLarge) {
    const Block cached = blocks().take(bytes);
    if (cached.data != nullptr) return cached;
  }
  const std::size_t unit = bytes >= kHugePage ? kHugePage : bytes >= kLarge ? kPage : kLine;
  bytes = round_up_to(bytes == 0 ? 1 : bytes, unit);
  void* data = std::aligned_alloc(unit, bytes);
  if (data == nullptr) throw std::bad_alloc();
#ifdef __linux__
  // Huge pages are worth it for blocks that are kept. For others the system takes long to find them: half a second for
  // 512 MiB.
  if (unit == kHugePage && bytes <= kMostCached) madvise(data, bytes, MADV_HUGEPAGE);  // advice: it may be refused
#endif
  return {data, bytes};
}

void give_back(Block block) noexcept {
  if (!kSanitized && block.bytes >= kLarge && block.bytes <= kMostCached) {
    blocks().keep(block);
  } else {
    std::free(block.data);
  }
}

}  // namespace alterrec
