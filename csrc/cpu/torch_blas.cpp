#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>

#include "cpu/blas.h"
#include "cpu/isa.h"

namespace alterrec {
namespace {

at::Tensor view(const float* data, int64_t rows, int64_t cols, int64_t stride) {
  return at::from_blob(const_cast<float*>(data), {rows, cols}, {stride, 1}, at::TensorOptions().dtype(at::kFloat));
}

at::Tensor view(const Factor& x, int64_t rows, int64_t cols) {
  return x.transposed ? view(x.data, cols, rows, x.stride).t() : view(x.data, rows, cols, x.stride);
}

}  // namespace

void sgemm(int64_t m, int64_t n, int64_t k, const Factor& a, const Factor& b, float* c, int64_t ldc, bool accumulate) {
  const at::InferenceMode guard;  // plain tensors: no autograd on the way to the BLAS
  const at::Tensor left = view(a, m, k), right = view(b, k, n);
  at::Tensor out = view(c, m, n, ldc);
  if (accumulate) {
    out.addmm_(left, right);
  } else {
    at::mm_out(out, left, right);
  }
}

namespace {

// Whether torch's brgemm serves such operands on this CPU: it says so by throwing, where torch was built without it.
template <class Value>
bool brgemm_serves(const Value* a, const Value* b, float* c) {
  try {
    at::native::cpublas::brgemm(1, 16, 2, 2, 16, 16, false, a, b, c);
    at::native::cpublas::brgemm_release();
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

}  // namespace

bool has_packed_product() {
  static const bool serves = [] {
    alignas(64) const float a[2] = {}, b[32] = {};
    alignas(64) float c[16];
    return isa() >= Isa::kAvx512 && brgemm_serves(a, b, c);
  }();
  return serves;
}

void packed_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                 int64_t ldc) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, false, a, b, c);
}

bool has_bf16_product() {
#if defined(__x86_64__)
  static const bool serves = [] {
    alignas(64) const at::BFloat16 a[2] = {}, b[32] = {};
    alignas(64) float c[16];
    // Elsewhere oneDNN would make do with float32 arithmetic.
    const bool instructions = __builtin_cpu_supports("amx-bf16") || __builtin_cpu_supports("avx512bf16");
    return instructions && brgemm_serves(a, b, c);
  }();
  return serves;
#else
  return false;
#endif
}

void bf16_gemm(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb,
               float* c, int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c);
}

void bf16_release() { at::native::cpublas::brgemm_release(); }

int num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void parallel_for(int64_t tasks, const std::function<void(int64_t)>& task) {
  const int64_t workers = std::min<int64_t>(tasks, num_threads());
  std::atomic<int64_t> next{0};  // tasks are handed out one by one: their lengths differ
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) task(i);
  });
}

}  // namespace alterrec
