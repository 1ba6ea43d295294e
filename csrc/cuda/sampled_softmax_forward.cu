// Forward: logits by gathered rows, with the log-sum-exp taken on the way.
#include <type_traits>

#include "cuda/gather.cuh"

namespace alterrec::cuda {
namespace {

constexpr int kItems = 4;           // items whose rows a group of lanes reads at once
constexpr int kSharedSessions = 4;  // sessions that use a shared negative's row while it is in registers
constexpr int kSharedWidth = 2048;  // up to which d shared memory holds the queries of so many
constexpr float kLowest = -INFINITY;

// Dot products of kItems rows with kSessions queries; a group of `lanes` lanes shares the work and the result. All
// lanes of the warp come here together.
template <int kSessions, Kind kind>
__device__ void dots(const Rows<kind>& catalog, const int64_t (&ids)[kItems], const float* query, int pitch, int lane,
                     int lanes, float (&sum)[kSessions][kItems]) {
  constexpr int kPiece = Rows<kind>::kPiece;
#pragma unroll
  for (int s = 0; s < kSessions; ++s) {
#pragma unroll
    for (int r = 0; r < kItems; ++r) sum[s][r] = 0.0f;
  }
  for (int piece = lane; piece < catalog.pieces(); piece += lanes) {
    float e[kItems][kPiece] = {};
#pragma unroll
    for (int r = 0; r < kItems; ++r) {
      if (ids[r] >= 0) catalog.load(ids[r], piece, e[r]);
    }
#pragma unroll
    for (int s = 0; s < kSessions; ++s) {
#pragma unroll
      for (int i = 0; i < kPiece; i += 4) {
        const float4 q = *reinterpret_cast<const float4*>(query + s * pitch + piece * kPiece + i);
#pragma unroll
        for (int r = 0; r < kItems; ++r) {
          sum[s][r] += q.x * e[r][i] + q.y * e[r][i + 1] + q.z * e[r][i + 2] + q.w * e[r][i + 3];
        }
      }
    }
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int s = 0; s < kSessions; ++s) {
#pragma unroll
      for (int r = 0; r < kItems; ++r) sum[s][r] += __shfl_xor_sync(0xffffffffu, sum[s][r], offset);
    }
  }
}

// The logit of a dot product; one that is not finite becomes NaN, which shows in the loss, and is reported.
__device__ float logit(const SampledSoftmax& p, int64_t row, int64_t id, float dot, uint64_t* fault) {
  if (id >= p.items) return NAN;
  float y = p.bias ? dot + p.bias[id] : dot;
  y /= temperature_of(p);
  if (p.log_q) y -= p.log_q[id];
  if (isfinite(y)) return y;
  if (fault) {
    const auto here = static_cast<unsigned long long>(row) << 32 | __float_as_uint(y);
    atomicMin(reinterpret_cast<unsigned long long*>(fault), here);
  }
  return NAN;
}

// A sum of exponentials, relative to the largest exponent.
struct Partition {
  float top = kLowest, sum = 0.0f;

  __device__ void add(const Partition& other) {
    const float largest = fmaxf(top, other.top);
    // Where an exponent is the largest, and where there is none at all, the factor is 1.
    sum = sum * (top == largest ? 1.0f : expf(top - largest)) +
          other.sum * (other.top == largest ? 1.0f : expf(other.top - largest));
    top = largest;
  }
};

// The loss of one row, by one warp: softplus(Z - y) summed over its target and positives.
template <Kind kind>
__device__ void finish_row(const SampledSoftmax& p, const Rows<kind>& catalog, int64_t row, const float* query,
                           const Partition& partition, const ForwardOutputs& out) {
  const int lane = threadIdx.x % kWarp, width = 1 + p.num_positives;
  const bool has_negatives = partition.sum != 0.0f;
  const float z = has_negatives ? partition.top + logf(partition.sum) : kLowest;
  float loss = 0.0f;
  for (int first = 0; first < width; first += kItems) {
    int64_t ids[kItems], known[kItems];
    float dot[1][kItems];
#pragma unroll
    for (int r = 0; r < kItems; ++r) {
      ids[r] = first + r < width ? pos_item(p, row, first + r) : -1;
      known[r] = ids[r] < p.items ? ids[r] : -1;
    }
    dots<1>(catalog, known, query, 0, lane, kWarp, dot);
#pragma unroll
    for (int r = 0; r < kItems; ++r) {
      if (ids[r] < 0 || lane != 0) continue;
      const float y = logit(p, row, ids[r], dot[0][r], out.fault);
      if (out.pos_logits) out.pos_logits[row * width + first + r] = y;
      const float x = z - y, softplus = fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
      // fmaxf drops NaN, so that what is not a number is passed on by itself.
      const float one = isnan(x) ? x : softplus;
      if (has_negatives) loss += first + r == 0 ? one : p.positive_weight * one;
    }
  }
  if (lane != 0) return;
  out.losses[row] = loss;
  out.lse[row] = z;
}

// One block serves kSessions sessions, which have one list of negatives where there are several.
template <Kind kind, int kSessions>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(SampledSoftmax p, Rows<kind> catalog, int lanes, ForwardOutputs out) {
  DYNAMIC_SHARED(memory);
  const int pitch = pitch_of(p.width);
  float* query = reinterpret_cast<float*>(memory);                             // (kSessions, pitch)
  auto* partitions = reinterpret_cast<Partition*>(query + kSessions * pitch);  // (kWarps, kSessions)
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kSessions;
  for (int i = threadIdx.x; i < kSessions * pitch; i += kThreads) {
    const int64_t row = first_row + i / pitch;
    const int column = i % pitch;
    query[i] = row < p.rows && column < p.width ? p.query[row * p.width + column] : 0.0f;
  }
  __syncthreads();

  int64_t target[kSessions];
#pragma unroll
  for (int s = 0; s < kSessions; ++s) target[s] = first_row + s < p.rows ? pos_item(p, first_row + s, 0) : -1;
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes, groups = kThreads / lanes;
  Partition partition[kSessions];
  for (int64_t begin = 0; begin < p.count; begin += groups * kItems) {
    int64_t ids[kItems], known[kItems];
    float dot[kSessions][kItems];
#pragma unroll
    for (int r = 0; r < kItems; ++r) {
      const int64_t j = begin + r * groups + group;
      ids[r] = j < p.count ? negative_at(p, first_row, j) : -1;
      known[r] = ids[r] < p.items ? ids[r] : -1;
    }
    dots<kSessions>(catalog, known, query, pitch, lane, lanes, dot);
#pragma unroll
    for (int s = 0; s < kSessions; ++s) {
      const int64_t row = first_row + s;
#pragma unroll
      for (int r = 0; r < kItems; ++r) {
        const int64_t j = begin + r * groups + group;
        if (lane != 0 || row >= p.rows || j >= p.count) continue;
        const bool negative = ids[r] >= 0 && target[s] >= 0 && ids[r] != target[s] && !masked(p, ids[r]);
        const float y = negative ? logit(p, row, ids[r], dot[s][r], out.fault) : kLowest;
        if (negative) partition[s].add({isnan(y) ? kLowest : y, isnan(y) ? NAN : 1.0f});
        if (out.logits) out.logits[row * p.count + j] = y;
      }
    }
  }

  // Groups into warps, warps into the block; the first lane of each group holds its sum, the others none.
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int s = 0; s < kSessions; ++s) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const float top = __shfl_xor_sync(0xffffffffu, partition[s].top, offset);
      const float sum = __shfl_xor_sync(0xffffffffu, partition[s].sum, offset);
      partition[s].add({top, sum});
    }
    if (threadIdx.x % kWarp == 0) partitions[warp * kSessions + s] = partition[s];
  }
  __syncthreads();
  if (warp >= kSessions || first_row + warp >= p.rows) return;
  Partition whole;
  for (int w = 0; w < kWarps; ++w) whole.add(partitions[w * kSessions + warp]);
  finish_row(p, catalog, first_row + warp, query + warp * pitch, whole, out);
}

template <Kind kind, int kSessions>
void start(const SampledSoftmax& p, const ForwardOutputs& out, cudaStream_t stream) {
  const size_t bytes = sizeof(float) * kSessions * pitch_of(p.width) + sizeof(Partition) * kWarps * kSessions;
  const int lanes = lanes_for(ceil_div(p.width, Rows<kind>::kPiece), 1, kWarp);
  launch(forward_kernel<kind, kSessions>, ceil_div(p.rows, kSessions), kThreads, bytes, stream, p,
         catalog_rows<kind>(p), lanes, out);
}

}  // namespace

void forward(const SampledSoftmax& p, const ForwardOutputs& out, cudaStream_t stream) {
  with_kind(p.kind, [&](auto kind) {
    if (p.shared && p.width <= kSharedWidth) {
      start<decltype(kind)::value, kSharedSessions>(p, out, stream);
    } else {
      start<decltype(kind)::value, 1>(p, out, stream);
    }
  });
}

}  // namespace alterrec::cuda
