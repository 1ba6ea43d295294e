// blas.h in plain C++, so that sanitizers see every access and every thread.
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/blas.h"

namespace alterrec {
namespace {

constexpr int kThreads = 3;
thread_local bool inside = false;

float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

}  // namespace

void sgemm(int64_t m, int64_t n, int64_t k, const Factor& a, const Factor& b, float* c, int64_t ldc, bool accumulate) {
  const auto at = [](const Factor& x, int64_t r, int64_t col) {
    return x.transposed ? x.data[col * x.stride + r] : x.data[r * x.stride + col];
  };
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = accumulate ? c[i * ldc + j] : 0.0f;
      for (int64_t l = 0; l < k; ++l) sum += at(a, i, l) * at(b, l, j);
      c[i * ldc + j] = sum;
    }
  }
}

bool has_packed_product() { return true; }

void packed_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                 int64_t ldc) {
  sgemm(m, n, k, {a, lda}, {b, ldb}, c, ldc, false);
}

bool has_bf16_product() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx512bf16");  // what packing for it needs
#else
  return false;
#endif
}

void bf16_gemm(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb,
               float* c, int64_t ldc, bool accumulate) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = accumulate ? c[i * ldc + j] : 0.0f;
      for (int64_t l = 0; l < k; ++l) {
        sum += from_bf16(a[i * lda + l]) * from_bf16(b[l / 2 * ldb * 2 + j * 2 + l % 2]);
      }
      c[i * ldc + j] = sum;
    }
  }
}

void bf16_release() {}

int num_threads() { return inside ? 1 : kThreads; }

void parallel_for(int64_t tasks, const std::function<void(int64_t)>& task) {
  if (inside) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      inside = true;
      try {
        for (int64_t i = next++; i < tasks; i = next++) task(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        failure = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace alterrec
