// sampled_softmax for CUDA tensors: the only file that knows torch.library and csrc/cuda. It needs no CUDA headers and
// no CUDA build of torch; where nvcc is missing it is left out.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "check.h"
#include "cuda/sampled_softmax.h"

namespace alterrec::cuda {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

cudaStream_t stream_of(const at::Tensor& tensor) {
  const c10::impl::VirtualGuardImpl guard(tensor.device().type());
  return static_cast<cudaStream_t>(guard.getStreamNativeHandle(guard.getStream(tensor.device())));
}

OptionalTensor as_floats(const OptionalTensor& x) {
  return x ? OptionalTensor(x->detach().to(at::kFloat).contiguous()) : std::nullopt;
}

const float* data_or_null(const OptionalTensor& x) { return x ? x->const_data_ptr<float>() : nullptr; }

template <class T>
T* data_or_null(const at::Tensor& x) {
  return x.defined() ? x.data_ptr<T>() : nullptr;
}

// Raises ValueError where an id is neither `none` nor in [0, stop); synchronises.
void check_ids(const char* name, const at::Tensor& ids, int64_t none, int64_t stop) {
  const at::Tensor bad = ids.ne(none).logical_and_(ids.lt(0).logical_or_(ids.ge(stop))).nonzero();
  if (bad.size(0) == 0) return;
  const at::Tensor first = bad[0].cpu();
  at::Tensor value = ids;
  for (int64_t i = 0; i < first.numel(); ++i) value = value[first[i].item<int64_t>()];
  TORCH_CHECK_VALUE(false, name, ": row ", first[0].item<int64_t>(), " holds ", value.item<int64_t>(), ", expected ",
                    none, " or an id in [0, ", stop, ")");
}

// A problem together with the tensors that it points into.
struct Arguments {
  at::Tensor query, catalog, target, negatives, positives;
  OptionalTensor bias, log_q;
  SampledSoftmax problem{};

  Arguments(const at::Tensor& query_, const at::Tensor& catalog_, const at::Tensor& target_,
            const at::Tensor& negatives_, const OptionalTensor& log_q_, const OptionalTensor& positives_,
            double positive_weight, double temperature, const OptionalTensor& bias_, int64_t ignore_index, bool bf16)
      : catalog(catalog_),
        target(target_.to(at::kLong).contiguous()),
        negatives(negatives_.contiguous()),
        bias(as_floats(bias_)),
        log_q(as_floats(log_q_)) {
    check_matrix("query", query_, query_.size(-1));
    check_matrix("catalog", catalog, query_.size(1));
    check_vector("target", target, query_.size(0));
    TORCH_CHECK_VALUE(query_.size(1) <= kMostWidth, "d must be at most ", kMostWidth, ", got ", query_.size(1));
    TORCH_CHECK_VALUE(catalog.size(0) < std::numeric_limits<int32_t>::max(),
                      "catalog must hold fewer than 2^31 - 1 items, got ", catalog.size(0));
    query = (bf16 ? query_.to(at::kBFloat16) : query_).to(at::kFloat).contiguous();
    if (positives_) positives = positives_->to(at::kLong).contiguous();
    const bool narrow = catalog.scalar_type() == at::kBFloat16;
    const int64_t stride = catalog.size(0) > 1 ? catalog.stride(0) : catalog.size(1);
    problem.query = query.const_data_ptr<float>();
    problem.catalog = catalog.const_data_ptr();
    problem.stride = stride;
    problem.kind = narrow ? Kind::kBFloat16 : bf16 ? Kind::kRounded : Kind::kFloat;
    problem.aligned = reinterpret_cast<uintptr_t>(problem.catalog) % 16 == 0 && stride * (narrow ? 2 : 4) % 16 == 0;
    problem.rows = query.size(0);
    problem.items = catalog.size(0);
    problem.width = static_cast<int>(query.size(1));
    problem.target = target.const_data_ptr<int64_t>();
    problem.positives = positives.defined() ? positives.const_data_ptr<int64_t>() : nullptr;
    problem.num_positives = positives.defined() ? static_cast<int>(positives.size(1)) : 0;
    problem.negatives = negatives.const_data_ptr();
    problem.wide = negatives.scalar_type() == at::kLong;
    problem.shared = negatives.dim() == 1;
    problem.count = negatives.size(-1);
    problem.bias = data_or_null(bias);
    problem.log_q = data_or_null(log_q);
    problem.positive_weight = static_cast<float>(positive_weight);
    problem.temperature = static_cast<float>(temperature);
    problem.ignore_index = ignore_index;
  }
  Arguments(const Arguments&) = delete;

  int64_t num_wanted() const { return 1 + problem.num_positives; }
  int64_t kept_bytes() const { return problem.rows * (problem.count + num_wanted()) * sizeof(float); }
  at::Tensor floats(at::IntArrayRef sizes) const { return at::empty(sizes, query.options()); }

  // (B (1 + P) + negatives,) int32: the item of each entry of Sorted; V where it is none.
  at::Tensor entries() const {
    const at::Tensor first = target.unsqueeze(1);
    const at::Tensor wanted = positives.defined() ? at::cat({first, positives}, 1) : first;
    const at::Tensor none = first.eq(problem.ignore_index).logical_or_(first.lt(0));
    const at::Tensor ids = at::cat({wanted.masked_fill(none, -1).flatten(), negatives.flatten().to(at::kLong)});
    const at::Tensor bad = ids.lt(0).logical_or_(ids.ge(problem.items));
    return ids.masked_fill(bad, problem.items).to(at::kInt);
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> sampled_softmax(
    const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target, const at::Tensor& negatives,
    const OptionalTensor& log_q, const OptionalTensor& positives, double positive_weight, double temperature,
    const OptionalTensor& bias, int64_t ignore_index, bool /* sparse_grad: for the backward pass */, int64_t kept_size,
    bool bf16, bool check) {
  const c10::DeviceGuard guard(query.device());
  const Arguments arguments(query, catalog, target, negatives, log_q, positives, positive_weight, temperature, bias,
                            ignore_index, bf16);
  const SampledSoftmax& p = arguments.problem;
  if (check) {
    check_ids("target", target, ignore_index, p.items);
    check_ids("neg", negatives, -1, p.items);
    if (positives) check_ids("positives", *positives, -1, p.items);
  }
  const at::Tensor losses = arguments.floats({p.rows}), log_partition = arguments.floats({p.rows});
  const at::Tensor kept = at::empty({kept_size}, query.options().dtype(at::kByte));
  const bool keeps = kept_size > 0 && kept_size >= arguments.kept_bytes();
  float* logits = keeps ? static_cast<float*>(kept.data_ptr()) : nullptr;
  const at::Tensor fault = check ? at::full({1}, -1, target.options().dtype(at::kLong)) : at::Tensor();
  forward(p, logits, keeps ? logits + p.rows * p.count : nullptr, losses.data_ptr<float>(),
          log_partition.data_ptr<float>(), check ? reinterpret_cast<uint64_t*>(fault.data_ptr<int64_t>()) : nullptr,
          stream_of(query));
  const uint64_t found = check ? static_cast<uint64_t>(fault.item<int64_t>()) : kNoFault;
  const uint32_t bits = static_cast<uint32_t>(found);
  float score;
  std::memcpy(&score, &bits, sizeof(score));  // torch before 2.13 compiles extensions as C++17, without std::bit_cast
  TORCH_CHECK_VALUE(found == kNoFault, "scores: row ", found >> 32, " has a score of ", score,
                    ", expected a finite one");
  return {losses, log_partition, kept};
}

// -> gradients of query, catalog and bias, and the items whose rows the catalog's holds: none where it holds all.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sampled_softmax_backward(
    const at::Tensor& grad_losses, const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target,
    const at::Tensor& negatives, const OptionalTensor& log_q, const OptionalTensor& positives, double positive_weight,
    double temperature, const OptionalTensor& bias, int64_t ignore_index, bool sparse, bool bf16,
    const at::Tensor& log_partition, const at::Tensor& kept, c10::List<bool> needs) {
  const c10::DeviceGuard guard(query.device());
  const cudaStream_t stream = stream_of(query);
  const Arguments arguments(query, catalog, target, negatives, log_q, positives, positive_weight, temperature, bias,
                            ignore_index, bf16);
  const SampledSoftmax& p = arguments.problem;
  TORCH_CHECK_VALUE(kept.numel() >= arguments.kept_bytes(), "kept must hold ", arguments.kept_bytes(),
                    " bytes from the forward pass, got ", kept.numel());
  const at::Tensor grad = grad_losses.to(at::kFloat).contiguous();
  const at::Tensor weights = arguments.floats({p.rows}), pulls = arguments.floats({p.rows, arguments.num_wanted()});
  const auto* logits = static_cast<const float*>(kept.const_data_ptr());
  const Slopes x{logits,
                 logits + p.rows * p.count,
                 log_partition.const_data_ptr<float>(),
                 grad.const_data_ptr<float>(),
                 weights.data_ptr<float>(),
                 pulls.data_ptr<float>()};
  slopes(p, x, stream);

  at::Tensor grad_query = arguments.floats({0}), grad_catalog, grad_bias;
  at::Tensor items = at::empty({0}, target.options().dtype(at::kLong));
  if (needs[0]) {
    grad_query = arguments.floats({p.rows, p.width});
    query_gradient(p, x, grad_query.data_ptr<float>(), stream);
  }
  // Atomics would round a bfloat16 gradient at every addition, and leave no list of the touched rows.
  const bool narrow = catalog.scalar_type() == at::kBFloat16;
  const bool atomics = !p.shared && !sparse && !narrow && !at::globalContext().deterministicAlgorithms();
  if (atomics) {
    if (needs[1]) grad_catalog = at::zeros({p.items, p.width}, query.options().dtype(at::kFloat));
    if (needs[2]) grad_bias = at::zeros({p.items}, query.options().dtype(at::kFloat));
    if (needs[1] || needs[2]) {
      scatter_gradients(p, x, data_or_null<float>(grad_catalog), data_or_null<float>(grad_bias), stream);
    }
  } else if (needs[1] || needs[2]) {
    auto [rows, order] = arguments.entries().sort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
    int64_t limit = p.items;
    if (sparse) {
      const auto [unique, inverse, counts] = at::unique_consecutive(rows, /*return_inverse=*/true);
      limit = unique.lt(p.items).sum().item<int64_t>();
      items = unique.slice(0, 0, limit).to(at::kLong);
      rows = inverse.to(at::kInt);
    }
    // Rows that nothing pulls at are not written; of a sparse gradient there are none.
    if (needs[1]) grad_catalog = at::zeros({limit, p.width}, catalog.options());
    if (needs[2]) grad_bias = at::zeros({limit}, query.options().dtype(at::kFloat));
    at::Tensor shared_rows, shared_totals;
    if (p.shared) {
      shared_rows = arguments.floats({p.count, p.width});
      shared_totals = arguments.floats({p.count});
      shared_gradient(p, x, shared_rows.data_ptr<float>(), shared_totals.data_ptr<float>(), stream);
    }
    const at::Tensor scratch = arguments.floats({segment_scratch(rows.numel(), p.width)});
    const Sorted sorted{rows.const_data_ptr<int32_t>(), order.const_data_ptr<int64_t>(), rows.numel(),
                        static_cast<int32_t>(limit)};
    const RowGradients out{needs[1] ? grad_catalog.data_ptr() : nullptr, narrow, data_or_null<float>(grad_bias)};
    segment_gradients(p, x, data_or_null<float>(shared_rows), data_or_null<float>(shared_totals), sorted,
                      scratch.data_ptr<float>(), out, stream);
    if (sparse && needs[2]) {
      grad_bias = at::zeros({p.items}, grad_bias.options()).index_copy_(0, items, grad_bias);
    }
  }
  if (!grad_catalog.defined()) grad_catalog = at::empty({0}, catalog.options());
  if (!grad_bias.defined()) grad_bias = arguments.floats({0});
  return {grad_query.to(query.scalar_type()), grad_catalog, bias ? grad_bias.to(bias->scalar_type()) : grad_bias,
          items};
}

}  // namespace
}  // namespace alterrec::cuda

TORCH_LIBRARY_IMPL(alterrec_fast, CUDA, m) {
  m.impl("sampled_softmax", &alterrec::cuda::sampled_softmax);
  m.impl("sampled_softmax_backward", &alterrec::cuda::sampled_softmax_backward);
}
