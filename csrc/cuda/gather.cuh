// What the passes share: the items of a row, and rows of embeddings read in pieces of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/sampled_softmax.h"

namespace alterrec::cuda {

constexpr int kWarp = 32, kThreads = 256, kWarps = kThreads / kWarp;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The least power of two that is at least n and at least `least`, but no more than `most`.
inline int lanes_for(int64_t n, int least, int most) {
  int lanes = least;
  while (lanes < n && lanes < most) lanes *= 2;
  return lanes;
}

// Floats of a query's row in shared memory, zero beyond d: whole pieces of either kind.
__host__ __device__ inline int pitch_of(int width) { return (width + 7) / 8 * 8; }

// The target for k = 0, then the positives; -1 for none, all of them in a row whose target is ignored.
__device__ inline int64_t pos_item(const SampledSoftmax& p, int64_t row, int k) {
  const int64_t target = p.target[row];
  if (target == p.ignore_index || target < 0) return -1;
  if (k == 0) return target;
  const int64_t positive = p.positives[row * p.num_positives + k - 1];
  return positive < 0 ? -1 : positive;
}

// Whether the bias says that an item never is a negative.
__device__ inline bool masked(const SampledSoftmax& p, int64_t id) {
  return p.bias && id < p.items && p.bias[id] == -INFINITY;
}

// The id at place j of a row's negatives, as it stands there.
__device__ inline int64_t negative_at(const SampledSoftmax& p, int64_t row, int64_t j) {
  const int64_t at = p.shared ? j : row * p.count + j;
  return p.wide ? static_cast<const int64_t*>(p.negatives)[at] : static_cast<const int32_t*>(p.negatives)[at];
}

// d loss / d (q . e) of the negative at place j. Its logit is -inf where it is none for this row.
__device__ inline float dlogit_of(const DLogits& x, int64_t count, int64_t row, int64_t j) {
  const float weight = x.weights[row];
  return weight == 0.0f ? 0.0f : weight * expf(x.logits[row * count + j] - x.lse[row]);
}

__device__ inline float temperature_of(const SampledSoftmax& p) {
  return p.temperature_at ? *p.temperature_at : p.temperature;
}

// Every element type as float and back, rounded to nearest.
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
template <class Element>
__device__ inline Element from_float(float x) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// What rows of a kind store, and what their values are rounded to.
template <Kind kind>
using StoredAs =
    std::conditional_t<kind == Kind::kBFloat16, __nv_bfloat16, std::conditional_t<kind == Kind::kHalf, __half, float>>;
template <Kind kind>
using RoundedTo = std::conditional_t<kind == Kind::kRoundedToBFloat16, __nv_bfloat16,
                                     std::conditional_t<kind == Kind::kRoundedToHalf, __half, StoredAs<kind>>>;

// A matrix whose rows are read in pieces of 16 bytes; what lies beyond its width reads as zero.
template <Kind kind>
struct Rows {
  using Element = StoredAs<kind>;
  static constexpr int kPiece = 16 / sizeof(Element);

  const void* data;
  int64_t stride;
  int width;
  bool aligned;

  __device__ int pieces() const { return (width + kPiece - 1) / kPiece; }

  __device__ void load(int64_t row, int piece, float (&out)[kPiece]) const {
    const int first = piece * kPiece;
    const Element* from = static_cast<const Element*>(data) + row * stride + first;
    if (aligned && first + kPiece <= width) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from);
      const Element* values = reinterpret_cast<const Element*>(&bits);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) out[i] = widen(values[i]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kPiece; ++i) out[i] = first + i < width ? widen(from[i]) : 0.0f;
  }

 private:
  __device__ static float widen(Element x) {
    if constexpr (std::is_same_v<RoundedTo<kind>, Element>) {
      return to_float(x);
    } else {
      return to_float(from_float<RoundedTo<kind>>(x));
    }
  }
};

template <Kind kind>
Rows<kind> catalog_rows(const SampledSoftmax& p) {
  return {p.catalog, p.stride, p.width, p.aligned};
}

// Queries, or sums of them: dense float32 rows of the problem's width.
__host__ __device__ inline Rows<Kind::kFloat> dense_rows(const float* data, int width) {
  return {data, width, width, width % 4 == 0};
}

template <class F>
void with_kind(Kind kind, const F& f) {
  switch (kind) {
    case Kind::kFloat:
      return f(std::integral_constant<Kind, Kind::kFloat>());
    case Kind::kBFloat16:
      return f(std::integral_constant<Kind, Kind::kBFloat16>());
    case Kind::kHalf:
      return f(std::integral_constant<Kind, Kind::kHalf>());
    case Kind::kRoundedToBFloat16:
      return f(std::integral_constant<Kind, Kind::kRoundedToBFloat16>());
    case Kind::kRoundedToHalf:
      return f(std::integral_constant<Kind, Kind::kRoundedToHalf>());
  }
}

}  // namespace alterrec::cuda
