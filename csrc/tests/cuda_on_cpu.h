// What cuda/*.cu needs of CUDA, for a C++ compiler. A block's threads are fibers of one thread or, under
// -DCUDA_ON_CPU_THREADS, threads of their own, so that ThreadSanitizer sees where a sync is missing. Blocks run one
// after another; each has shared memory of its own on the heap, full of NaN, with AddressSanitizer at its ends.
#pragma once

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace cuda_on_cpu {

constexpr int kWarp = 32;

#ifdef CUDA_ON_CPU_THREADS

inline thread_local int self = 0;

class Barrier {
 public:
  explicit Barrier(int count) { pthread_barrier_init(&barrier_, nullptr, static_cast<unsigned>(count)); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

template <class Body>
void run_threads(int count, const Body& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([i, &body] {
      self = i;
      body();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

#else

inline int self = 0;     // the fiber that runs
inline int moves = 0;    // barriers that opened and fibers that ended, since the last round
inline ucontext_t home;  // the loop over all fibers
inline std::vector<ucontext_t> fibers;

class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait() {
    const int round = round_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++round_;
      ++moves;
    }
    while (round == round_) swapcontext(&fibers[self], &home);
  }

 private:
  int count_, arrived_ = 0, round_ = 0;
};

template <class Body>
void run_threads(int count, const Body& body) {
  constexpr size_t kStack = 256 << 10;
  static std::vector<std::unique_ptr<char[]>> stacks;
  static const Body* current;
  static std::vector<char> ended;
  while (static_cast<int>(stacks.size()) < count) stacks.emplace_back(new char[kStack]);
  current = &body;
  ended.assign(count, false);
  fibers.resize(count);
  for (int i = 0; i < count; ++i) {
    getcontext(&fibers[i]);
    fibers[i].uc_stack = {stacks[i].get(), 0, kStack};
    fibers[i].uc_link = &home;
    makecontext(
        &fibers[i],
        +[] {
          (*current)();
          ended[self] = true;
          ++moves;
        },
        0);
  }
  for (int left = count; left > 0;) {
    moves = left = 0;
    for (self = 0; self < count; ++self) {
      if (ended[self]) continue;
      swapcontext(&home, &fibers[self]);
      left += !ended[self];
    }
    if (left == 0 || moves > 0) continue;
    std::printf("%d threads wait for others that never come\n", left);
    std::exit(1);
  }
}

#endif

// What the threads of a block share.
struct Block {
  Barrier all;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<float> passed;  // by shuffles
  std::unique_ptr<unsigned char[]> shared;

  Block(int threads, size_t bytes) : all(threads), passed(threads), shared(new unsigned char[bytes]) {
    for (int i = 0; i < threads; i += kWarp) warps.push_back(std::make_unique<Barrier>(std::min(kWarp, threads - i)));
    std::memset(shared.get(), 0xff, bytes);
  }
};
inline Block* block = nullptr;
inline unsigned block_index = 0;

inline void sync_warp() { block->warps[self / kWarp]->wait(); }
inline float shuffle_xor(float value, int offset) {
  block->passed[self] = value;
  sync_warp();
  const float other = block->passed[self ^ offset];
  sync_warp();
  return other;
}

}  // namespace cuda_on_cpu

#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx (uint3{static_cast<unsigned>(cuda_on_cpu::self), 0, 0})
#define blockIdx (uint3{cuda_on_cpu::block_index, 0, 0})
#define DYNAMIC_SHARED(name) unsigned char* const name = cuda_on_cpu::block->shared.get()

inline void __syncthreads() { cuda_on_cpu::block->all.wait(); }
inline float __shfl_xor_sync(unsigned, float value, int offset) { return cuda_on_cpu::shuffle_xor(value, offset); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline void atomicAdd(float* to, float x) { std::atomic_ref(*to).fetch_add(x, std::memory_order_relaxed); }
inline void atomicMin(unsigned long long* to, unsigned long long x) {
  std::atomic_ref word(*to);
  unsigned long long old = word.load();
  while (x < old && !word.compare_exchange_weak(old, x)) continue;
}
using std::isfinite, std::isnan;

namespace alterrec::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t,
            Arguments... arguments) {
  for (int64_t i = 0; i < blocks; ++i) {
    cuda_on_cpu::Block block(threads, shared_bytes);
    cuda_on_cpu::block = &block;
    cuda_on_cpu::block_index = static_cast<unsigned>(i);
    cuda_on_cpu::run_threads(threads, [&] { kernel(arguments...); });
  }
}

}  // namespace alterrec::cuda
