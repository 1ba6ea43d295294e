// sampled_softmax on the GPU: raw pointers and a stream, so that neither torch nor its CUDA headers are needed.
//
// A pass never holds the B x n x d gather. Forward saves the logits of negatives (B, n) and of target and positives
// (B, 1 + P); backward turns them into dlogits, d loss / d (q . e), and sums rows of the catalog (for the queries) and
// queries (for the catalog) under them. All sums are in float32.
#pragma once

#include <cstdint>

#include "format.h"

using cudaStream_t = struct CUstream_st*;  // as in CUDA's own headers, which the binding does without

namespace alterrec::cuda {

// How the catalog is stored and read: each value as it stands, or a float32 rounded to a 16-bit format.
enum class Kind { kFloat, kBFloat16, kHalf, kRoundedToBFloat16, kRoundedToHalf };

// The problem; see LossProblem of the CPU engine. Ids below 0 are none; one beyond the catalog makes its row's loss
// NaN.
struct SampledSoftmax {
  const float* query;   // (B, d) dense, rounded where the products are of 16 bits, zero in ignored rows
  const void* catalog;  // (V, d), rows `stride` elements apart
  int64_t stride;
  Kind kind;
  bool aligned;  // whether every row of the catalog starts on 16 bytes
  int64_t rows, items;
  int width;                 // d
  const int64_t* target;     // (B,)
  const int64_t* positives;  // (B, P)
  int num_positives;         // P
  const void* negatives;     // (B, n), or (n,) where `shared`
  bool wide, shared;         // wide: int64 negatives, else int32
  int64_t count;             // n
  const float* bias;         // (V,) or null; -inf: the item is no negative
  const float* log_q;        // (V,) or null
  float positive_weight, temperature;
  const float* temperature_at;  // where the temperature stands on the device; null: it is `temperature`
  int64_t ignore_index;
};

constexpr int64_t kMostWidth = 8192;        // what shared memory holds of a query
constexpr uint64_t kNoFault = ~uint64_t{};  // a fault is row << 32 | the bits of a score that is not finite

// What the forward pass writes. Logits may be null where there is no backward pass, and the fault where nothing is
// checked.
struct ForwardOutputs {
  float* logits;      // (B, n)
  float* pos_logits;  // (B, 1 + P)
  float* losses;      // (B,)
  float* lse;         // (B,)
  uint64_t* fault;    // one word that holds kNoFault and gets the least fault
};
void forward(const SampledSoftmax& p, const ForwardOutputs& out, cudaStream_t stream);

// What the backward pass knows of forward, and what dlogits() makes of it.
struct DLogits {
  const float *logits, *pos_logits, *lse, *grad_losses;
  float* weights;      // (B,): a negative's dlogit is weight * exp(logit - lse)
  float* pos_dlogits;  // (B, 1 + P), those of target and positives
};
void dlogits(const SampledSoftmax& p, const DLogits& x, cudaStream_t stream);

// out (B, d): sums of catalog rows, in a fixed order.
void query_gradient(const SampledSoftmax& p, const DLogits& x, float* out, cudaStream_t stream);

// For each place in a list of shared negatives sums over all sessions, in a fixed order; null where none are shared.
// segment_gradients() joins the places that hold one item.
struct SharedSums {
  float* rows;    // (n, d), sums of queries
  float* totals;  // (n,), sums of dlogits
};
void shared_gradient(const SampledSoftmax& p, const DLogits& x, const SharedSums& out, cudaStream_t stream);

// Adds into catalog (V, d) and bias (V,), either may be null, by atomics: in no fixed order. Not for shared negatives.
void scatter_gradients(const SampledSoftmax& p, const DLogits& x, float* catalog, float* bias, cudaStream_t stream);

// All that adds to the catalog's gradient, sorted by its row there: entries 0 .. B (1 + P) - 1 are targets and
// positives, then come the negatives as they are stored.
struct Sorted {
  const int32_t* rows;   // (count,), ascending; from `limit` on there is no row
  const int64_t* order;  // (count,), entries
  int64_t count;
  int32_t limit;
};
constexpr int64_t kRun = 64;  // entries that one sum goes over before sums of one row are joined
// Floats of scratch that segment_gradients() needs.
inline int64_t segment_scratch(int64_t count, int width) { return (count + kRun - 1) / kRun * 2 * (width + 1); }

// Where segment_gradients() writes the rows that have entries; either may be null.
struct RowGradients {
  void* catalog;  // (limit, d)
  Format format;  // of the catalog's
  float* bias;    // (limit,)
};
// Sums in a fixed order. `scratch` holds segment_scratch() floats.
void segment_gradients(const SampledSoftmax& p, const DLogits& x, const SharedSums& shared, const Sorted& sorted,
                       float* scratch, const RowGradients& out, cudaStream_t stream);

}  // namespace alterrec::cuda
