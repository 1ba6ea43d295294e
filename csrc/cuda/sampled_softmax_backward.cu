// Backward: dlogits from what forward saved, then sums of rows under them. The catalog's gradient has two ways: by
// atomics, or by entries sorted by item, whose sums have one order and need no float32 copy of a 16-bit gradient.
#include <type_traits>

#include "cuda/gather.cuh"

namespace alterrec::cuda {
namespace {

constexpr int kSharedSums = 4;  // sums that use a row while it is in registers

__device__ float sigmoid(float x) { return x >= 0.0f ? 1.0f / (1.0f + expf(-x)) : expf(x) / (1.0f + expf(x)); }

__global__ void __launch_bounds__(kThreads) dlogits_kernel(SampledSoftmax p, DLogits x) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= p.rows) return;
  const int width = 1 + p.num_positives;
  const float z = x.lse[row], grad = x.grad_losses[row] / temperature_of(p);
  float weight = 0.0f;
  for (int k = 0; k < width; ++k) {
    float g = 0.0f;
    if (z != -INFINITY && pos_item(p, row, k) >= 0) {
      g = (k == 0 ? 1.0f : p.positive_weight) * sigmoid(z - x.pos_logits[row * width + k]);
    }
    weight += g;
    x.pos_dlogits[row * width + k] = -g * grad;
  }
  x.weights[row] = weight * grad;
}

// What a block of sums_kernel sums: for each session the rows of its negatives, target and positives ...
template <Kind kind, int kSums>
struct OfSessions {
  static constexpr int kCount = kSums;
  SampledSoftmax p;
  DLogits x;
  Rows<kind> rows;

  __device__ int64_t sums() const { return p.rows; }
  __device__ int64_t inputs() const { return p.count; }
  __device__ int64_t input(int64_t first, int64_t j) const {
    const int64_t id = negative_at(p, first, j);
    return id < p.items ? id : -1;
  }
  __device__ float dlogit(int64_t row, int64_t j) const { return dlogit_of(x, p.count, row, j); }
  __device__ int extras() const { return 1 + p.num_positives; }
  __device__ int64_t extra(int64_t row, int k) const {
    const int64_t id = pos_item(p, row, k);
    return id < p.items ? id : -1;
  }
  __device__ float extra_dlogit(int64_t row, int k) const { return x.pos_dlogits[row * extras() + k]; }
};

// ... and for each shared negative the queries of all sessions.
struct OfSharedNegatives {
  static constexpr int kCount = kSharedSums;
  SampledSoftmax p;
  DLogits x;
  Rows<Kind::kFloat> rows;

  __device__ int64_t sums() const { return p.count; }
  __device__ int64_t inputs() const { return p.rows; }
  __device__ int64_t input(int64_t, int64_t row) const { return row; }
  __device__ float dlogit(int64_t j, int64_t row) const { return dlogit_of(x, p.count, row, j); }
  __device__ int extras() const { return 0; }
  __device__ int64_t extra(int64_t, int) const { return -1; }
  __device__ float extra_dlogit(int64_t, int) const { return 0.0f; }
};

// Sums s of dlogit(s, i) * row of input i, kCount sums a block with the same inputs. `lanes` threads hold a row's
// pieces; groups of them share the inputs and are joined in the end. out (sums, d); totals, the sums of dlogits, may be
// null.
template <class Of>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(Of of, int lanes, float* out, float* totals) {
  constexpr int kSums = Of::kCount, kPiece = decltype(of.rows)::kPiece, kColumns = kPiece + 1;  // the last: the total
  DYNAMIC_SHARED(memory);
  auto* inputs = reinterpret_cast<int64_t*>(memory);            // (kThreads,)
  auto* dlogits = reinterpret_cast<float*>(inputs + kThreads);  // (kSums, kThreads)
  auto* parts = dlogits + kSums * kThreads;                     // (kThreads, kColumns)
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSums;
  const int group = threadIdx.x / lanes, groups = kThreads / lanes;
  for (int begin = 0; begin < of.rows.pieces(); begin += lanes) {
    const int piece = begin + threadIdx.x % lanes;
    const bool inside = piece < of.rows.pieces();
    float sum[kSums][kColumns] = {};
    for (int64_t base = 0; base < of.inputs(); base += kThreads) {
      const int64_t mine = base + threadIdx.x;
      const bool real = mine < of.inputs();
      inputs[threadIdx.x] = real ? of.input(first, mine) : -1;
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        dlogits[s * kThreads + threadIdx.x] = real && first + s < of.sums() ? of.dlogit(first + s, mine) : 0.0f;
      }
      __syncthreads();  // the tile is there
#pragma unroll 4
      for (int i = group; i < kThreads; i += groups) {
        float e[kPiece] = {};
        if (inside && inputs[i] >= 0) of.rows.load(inputs[i], piece, e);
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
          const float dlogit = dlogits[s * kThreads + i];
#pragma unroll
          for (int c = 0; c < kPiece; ++c) sum[s][c] += dlogit * e[c];
          sum[s][kPiece] += dlogit;
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const int64_t at = first + s;
      if (at >= of.sums()) continue;  // so for the whole block
      for (int k = group; k < of.extras(); k += groups) {
        const int64_t row = of.extra(at, k);
        if (!inside || row < 0) continue;
        float e[kPiece];
        of.rows.load(row, piece, e);
#pragma unroll
        for (int c = 0; c < kPiece; ++c) sum[s][c] += of.extra_dlogit(at, k) * e[c];
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) parts[threadIdx.x * kColumns + c] = sum[s][c];
      __syncthreads();
      for (int column = threadIdx.x; column < lanes * kPiece; column += kThreads) {
        const int lane = column / kPiece, to = begin * kPiece + column;
        float whole = 0.0f;
        for (int g = 0; g < groups; ++g) whole += parts[(g * lanes + lane) * kColumns + column % kPiece];
        if (to < of.rows.width) out[at * of.rows.width + to] = whole;
      }
      if (totals && begin == 0 && threadIdx.x == 0) {
        float whole = 0.0f;
        for (int g = 0; g < groups; ++g) whole += parts[g * lanes * kColumns + kPiece];
        totals[at] = whole;
      }
      __syncthreads();
    }
  }
}

template <class Of>
void start_sums(const Of& of, int64_t sums, float* out, float* totals, cudaStream_t stream) {
  constexpr int kPiece = decltype(of.rows)::kPiece;
  const size_t bytes = kThreads * (sizeof(int64_t) + sizeof(float) * (Of::kCount + kPiece + 1));
  launch(sums_kernel<Of>, ceil_div(sums, Of::kCount), kThreads, bytes, stream, of,
         lanes_for(ceil_div(of.rows.width, kPiece), 1, kThreads), out, totals);
}

// One block adds what one session adds to the gradients of its items; a warp adds an item's row.
__global__ void __launch_bounds__(kThreads) scatter_kernel(SampledSoftmax p, DLogits x, float* catalog, float* bias) {
  DYNAMIC_SHARED(memory);
  auto* query = reinterpret_cast<float*>(memory);  // (d,)
  const int64_t row = blockIdx.x;
  for (int c = threadIdx.x; c < p.width; c += kThreads) query[c] = p.query[row * p.width + c];
  __syncthreads();
  const int width = 1 + p.num_positives, lane = threadIdx.x % kWarp;
  for (int64_t entry = threadIdx.x / kWarp; entry < width + p.count; entry += kWarps) {
    const int64_t j = entry - width;
    const int64_t id = j < 0 ? pos_item(p, row, static_cast<int>(entry)) : negative_at(p, row, j);
    if (id < 0 || id >= p.items) continue;
    const float dlogit = j < 0 ? x.pos_dlogits[row * width + entry] : dlogit_of(x, p.count, row, j);
    if (dlogit == 0.0f) continue;
    for (int c = lane; catalog && c < p.width; c += kWarp) atomicAdd(catalog + id * p.width + c, dlogit * query[c]);
    if (bias && lane == 0) atomicAdd(bias + id, dlogit);
  }
}

// What an entry adds to its row: dlogit * source (d,), and `amount` to the bias.
struct Entry {
  const float* source;
  float dlogit, amount;
};

__device__ Entry entry_at(const SampledSoftmax& p, const DLogits& x, const SharedSums& shared, int64_t at) {
  const int width = 1 + p.num_positives;
  if (at < p.rows * width) return {p.query + at / width * p.width, x.pos_dlogits[at], x.pos_dlogits[at]};
  at -= p.rows * width;
  if (shared.rows) return {shared.rows + at * p.width, 1.0f, shared.totals[at]};
  const int64_t row = at / p.count;
  const float dlogit = dlogit_of(x, p.count, row, at % p.count);
  return {p.query + row * p.width, dlogit, dlogit};
}

// Four columns of a row's sum, and once a row its bias, to where the row ends in the gradient ...
__device__ void write_row(const RowGradients& out, int64_t row, int width, int column, const float (&sum)[4],
                          float amount) {
  for (int c = 0; out.catalog && c < 4 && column + c < width; ++c) {
    const int64_t at = row * width + column + c;
    if (out.format == Format::kBF16) {
      static_cast<__nv_bfloat16*>(out.catalog)[at] = from_float<__nv_bfloat16>(sum[c]);
    } else if (out.format == Format::kF16) {
      static_cast<__half*>(out.catalog)[at] = from_float<__half>(sum[c]);
    } else {
      static_cast<float*>(out.catalog)[at] = sum[c];
    }
  }
  if (out.bias && column == 0) out.bias[row] = amount;
}

// ... or into scratch, whose rows hold the bias behind their d columns.
__device__ void write_part(float* part, int width, int column, const float (&sum)[4], float amount) {
  for (int c = 0; c < 4 && column + c < width; ++c) part[column + c] = sum[c];
  if (column == 0) part[width] = amount;
}

// Each group of `lanes` threads sums a run of kRun entries, row by row. A row that lies within the run is written; of
// one that began in an earlier run the sum is left in `heads`, of one that goes on in later runs in `tails`.
__global__ void __launch_bounds__(kThreads)
    segment_kernel(SampledSoftmax p, DLogits x, SharedSums shared, Sorted sorted, int lanes, float* heads, float* tails,
                   RowGradients out) {
  DYNAMIC_SHARED(memory);
  const int groups = kThreads / lanes, group = threadIdx.x / lanes, width = p.width;
  auto* entries = reinterpret_cast<Entry*>(memory);                  // (groups, kRun)
  auto* rows = reinterpret_cast<int32_t*>(entries + groups * kRun);  // (groups, kRun)
  const int64_t first_run = static_cast<int64_t>(blockIdx.x) * groups;
  for (int i = threadIdx.x; i < groups * kRun; i += kThreads) {
    const int64_t at = first_run * kRun + i;
    rows[i] = at < sorted.count ? sorted.rows[at] : sorted.limit;
    if (rows[i] < sorted.limit) entries[i] = entry_at(p, x, shared, sorted.order[at]);
  }
  __syncthreads();
  const int64_t run = first_run + group, start = run * kRun, stop = start + kRun;
  if (start >= sorted.count) return;
  rows += group * kRun;
  entries += group * kRun;
  const int32_t before = start > 0 ? sorted.rows[start - 1] : -1;
  const int32_t after = stop < sorted.count ? sorted.rows[stop] : sorted.limit;
  for (int column = threadIdx.x % lanes * 4; column < width; column += lanes * 4) {
    float sum[4] = {}, amount = 0.0f;
    bool head = rows[0] == before;
    for (int i = 0; i < kRun && rows[i] < sorted.limit; ++i) {
      float source[4];
      dense_rows(entries[i].source, width).load(0, column / 4, source);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[c] += entries[i].dlogit * source[c];
      amount += entries[i].amount;
      if ((i + 1 < kRun ? rows[i + 1] : after) == rows[i] && i + 1 < kRun) continue;
      if (head) {
        write_part(heads + run * (width + 1), width, column, sum, amount);
      } else if (i + 1 == kRun && after == rows[i]) {
        write_part(tails + run * (width + 1), width, column, sum, amount);
      } else {
        write_row(out, rows[i], width, column, sum, amount);
      }
      head = false;
      sum[0] = sum[1] = sum[2] = sum[3] = amount = 0.0f;
    }
  }
}

// Joins the sums of each row that lies in several runs, in their order; the run where it begins has a group do so.
__global__ void __launch_bounds__(kThreads)
    join_kernel(Sorted sorted, int width, int lanes, const float* heads, const float* tails, RowGradients out) {
  const int64_t run = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  const int64_t start = run * kRun, stop = start + kRun;
  if (stop >= sorted.count) return;
  const int32_t row = sorted.rows[stop - 1];
  const bool begins_here = start == 0 || sorted.rows[start - 1] != row;
  if (row >= sorted.limit || sorted.rows[stop] != row || !begins_here) return;
  for (int column = threadIdx.x % lanes * 4; column < width; column += lanes * 4) {
    float sum[4] = {}, amount = 0.0f;
    const float* part = tails + run * (width + 1);
    for (int64_t next = run;;) {
      for (int c = 0; c < 4 && column + c < width; ++c) sum[c] += part[column + c];
      amount += part[width];
      ++next;
      if (next * kRun >= sorted.count || sorted.rows[next * kRun] != row) break;
      part = heads + next * (width + 1);
    }
    write_row(out, row, width, column, sum, amount);
  }
}

}  // namespace

void dlogits(const SampledSoftmax& p, const DLogits& x, cudaStream_t stream) {
  launch(dlogits_kernel, ceil_div(p.rows, kThreads), kThreads, 0, stream, p, x);
}

void query_gradient(const SampledSoftmax& p, const DLogits& x, float* out, cudaStream_t stream) {
  with_kind(p.kind, [&](auto kind) {
    constexpr Kind kKind = decltype(kind)::value;
    if (p.shared) {
      start_sums(OfSessions<kKind, kSharedSums>{p, x, catalog_rows<kKind>(p)}, p.rows, out, nullptr, stream);
    } else {
      start_sums(OfSessions<kKind, 1>{p, x, catalog_rows<kKind>(p)}, p.rows, out, nullptr, stream);
    }
  });
}

void shared_gradient(const SampledSoftmax& p, const DLogits& x, const SharedSums& out, cudaStream_t stream) {
  start_sums(OfSharedNegatives{p, x, dense_rows(p.query, p.width)}, p.count, out.rows, out.totals, stream);
}

void scatter_gradients(const SampledSoftmax& p, const DLogits& x, float* catalog, float* bias, cudaStream_t stream) {
  launch(scatter_kernel, p.rows, kThreads, sizeof(float) * p.width, stream, p, x, catalog, bias);
}

void segment_gradients(const SampledSoftmax& p, const DLogits& x, const SharedSums& shared, const Sorted& sorted,
                       float* scratch, const RowGradients& out, cudaStream_t stream) {
  const int64_t runs = ceil_div(sorted.count, kRun);
  const int lanes = lanes_for(ceil_div(p.width, 4), kWarp, kThreads), groups = kThreads / lanes;
  float *heads = scratch, *tails = scratch + runs * (p.width + 1);
  launch(segment_kernel, ceil_div(runs, groups), kThreads, groups * kRun * (sizeof(Entry) + sizeof(int32_t)), stream, p,
         x, shared, sorted, lanes, heads, tails, out);
  launch(join_kernel, ceil_div(runs, groups), kThreads, 0, stream, sorted, p.width, lanes, heads, tails, out);
}

}  // namespace alterrec::cuda
