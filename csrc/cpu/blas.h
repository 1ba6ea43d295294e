// What the kernels borrow: matrix products and threads. From torch in the extension (torch_blas.cpp), from plain C++ in
// the sanitizers' test binary (tests/plain_blas.cpp), so that no kernel knows torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace alterrec {

// A row-major factor of a product, with its row stride as stored; its transpose is multiplied where asked for.
struct Factor {
  const float* data;
  int64_t stride;
  bool transposed = false;
};

// Row-major C (m x n) = A (m x k) B (k x n) + (accumulate ? C : 0); ldc is the row stride of C. Inside parallel_for it
// runs on one thread.
void sgemm(int64_t m, int64_t n, int64_t k, const Factor& a, const Factor& b, float* c, int64_t ldc, bool accumulate);

// Row-major C (m x n) = A (m x k) B (k x n) for a B that fits in the nearest cache; for such, and for few rows of A,
// faster than sgemm, which packs its operands in each call. Only where has_packed_product().
bool has_packed_product();
void packed_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                 int64_t ldc);

// Whether this CPU has instructions for bf16_gemm: those of AMX, or dot products of pairs (AVX512_BF16).
bool has_bf16_product();

// Row-major C (m x n) = A (m x k) B (+ C), bf16 bits accumulated in float32. B is stored in pairs of rows: element
// (r, c) at [(r / 2) * ldb * 2 + c * 2 + r % 2]; k is even. After the last call of a thread: bf16_release().
void bf16_gemm(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb,
               float* c, int64_t ldc, bool accumulate);
void bf16_release();

// How many threads parallel_for may use.
int num_threads();

// Calls task(i) once for each i in [0, tasks), spread over the threads; the first exception is thrown to the caller.
void parallel_for(int64_t tasks, const std::function<void(int64_t)>& task);

// Runs the tasks inside a parallel region even if there is only one: the BLAS then always uses one thread for each
// product, and rounds in the same way for any number of threads.
template <class Task>
inline void for_each(int64_t tasks, const Task& task) {
  parallel_for(std::max<int64_t>(tasks, 2), [&](int64_t i) {
    if (i < tasks) task(i);
  });
}

// Partial sums are over chunks. Their number must not depend on the number of threads, else results would.
// The chunk'th of `chunks` nearly equal parts of [0, n) begins here.
inline int64_t part(int64_t n, int64_t chunk, int64_t chunks) { return n * chunk / chunks; }

}  // namespace alterrec
