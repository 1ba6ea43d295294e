// Scratch memory that the next call uses again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace alterrec {

struct Block {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// Uninitialised memory on cache lines. The system fills fresh memory with zeros, page by page, which takes as long as
// writing and reading it once; so large blocks that are given back are kept for the next call, up to 256 MiB in all.
// From any thread.
Block take_block(std::size_t bytes);
void give_back(Block block) noexcept;

// An array in such memory; grows on demand, losing what it held.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept : block_(std::exchange(other.block_, {})) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~Buffer() { give_back(block_); }

  T* reserve(int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    if (bytes > block_.bytes) {
      give_back(std::exchange(block_, {}));
      block_ = take_block(bytes);
    }
    return get();
  }
  T* get() const { return static_cast<T*>(block_.data); }

 private:
  Block block_;
};

}  // namespace alterrec
