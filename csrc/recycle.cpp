#include "recycle.h"

#include <ATen/ATen.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace alterrec {
namespace {

constexpr std::size_t kHugePage = 2 << 20;
constexpr std::size_t kMostCached = 256 << 20;

struct Block {
  void* data;
  std::size_t bytes;
};

class Blocks {
 public:
  Block take(std::size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto block = free_.begin(); block != free_.end(); ++block) {
        if (block->bytes < bytes || block->bytes / 2 > bytes) continue;  // too small, or a waste
        const Block found = *block;
        free_.erase(block);
        cached_ -= found.bytes;
        return found;
      }
    }
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* data = std::aligned_alloc(kHugePage, bytes);
    if (data == nullptr) throw std::bad_alloc();
#ifdef __linux__
    madvise(data, bytes, MADV_HUGEPAGE);  // advice: it may be refused
#endif
    return {data, bytes};
  }

  // Keeps the block, and lets go of the oldest ones where there are too many.
  void give_back(Block block) {
    std::vector<Block> old;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.push_back(block);
      cached_ += block.bytes;
      while (cached_ > kMostCached) {
        old.push_back(free_.front());
        cached_ -= free_.front().bytes;
        free_.erase(free_.begin());
      }
    }
    for (const Block& each : old) std::free(each.data);
  }

 private:
  std::mutex mutex_;
  std::vector<Block> free_;
  std::size_t cached_ = 0;
};

// Never destroyed: tensors may outlive any static object.
Blocks& blocks() {
  static Blocks* const all = new Blocks;
  return *all;
}

}  // namespace

at::Tensor recycled_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  std::size_t bytes = c10::elementSize(dtype);
  for (const int64_t size : sizes) bytes *= size;
  const auto options = at::TensorOptions().dtype(dtype);
  if (bytes < kHugePage) return at::empty(sizes, options);
  const Block block = blocks().take(bytes);
  return at::from_blob(block.data, sizes, [block](void*) { blocks().give_back(block); }, options);
}

}  // namespace alterrec
