// sampled_softmax for CUDA tensors: the only file that knows torch.library and csrc/cuda. It needs no CUDA headers and
// no CUDA build of torch; where nvcc is missing it is left out.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <cmath>
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

OptionalTensor as_floats(const char* name, const OptionalTensor& x, int64_t length) {
  return x ? OptionalTensor(floats_of(name, *x, length)) : std::nullopt;
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

// Raises ValueError where an item of a row that is not ignored has a bias of -inf. The ids have been checked.
void check_not_masked(const char* name, const at::Tensor& ids, const at::Tensor& ignored, const at::Tensor& bias) {
  const at::Tensor rows = ignored.view({-1, 1}), table = ids.view({ids.size(0), -1});
  const at::Tensor item = table.masked_fill(rows.logical_or(table.lt(0)), 0);
  if (item.numel() == 0 || bias.numel() == 0) return;
  const at::Tensor masked = bias.index_select(0, item.flatten()).view_as(item).eq(-INFINITY);
  const at::Tensor bad = masked.logical_and_(table.ge(0)).logical_and_(rows.logical_not()).nonzero();
  if (bad.size(0) == 0) return;
  const int64_t row = bad[0][0].item<int64_t>(), place = bad[0][1].item<int64_t>();
  TORCH_CHECK_VALUE(false, name, ": row ", row, " holds ", table[row][place].item<int64_t>(), ", whose bias is -inf");
}

// What both passes are given.
struct Inputs {
  const at::Tensor &query, &catalog, &target, &negatives;
  const OptionalTensor &log_q, &positives;
  double positive_weight, temperature;
  const OptionalTensor& temperature_tensor;  // (), in temperature's place; read on the device
  const OptionalTensor& bias;
  int64_t ignore_index;
  c10::string_view precision;
};

// How rows of the catalog are read: as they are stored, or rounded from float32.
Kind kind_of(const at::Tensor& catalog, Format precision) {
  const Format stored = format_of(catalog);
  if (stored != Format::kF32) return stored == Format::kBF16 ? Kind::kBFloat16 : Kind::kHalf;
  if (precision == Format::kF32) return Kind::kFloat;
  return precision == Format::kBF16 ? Kind::kRoundedToBFloat16 : Kind::kRoundedToHalf;
}

// Values rounded as `precision` says, dense and in float32.
at::Tensor rounded(const at::Tensor& x, Format precision) {
  const at::Tensor values = precision == Format::kBF16  ? x.to(at::kBFloat16)
                            : precision == Format::kF16 ? x.to(at::kHalf)
                                                        : x;
  return values.to(at::kFloat).contiguous();
}

// A problem together with the tensors that it points into, checked.
struct Arguments {
  at::Tensor query, catalog, target, negatives, positives, ignored;
  OptionalTensor bias, log_q, temperature;
  SampledSoftmax problem{};

  explicit Arguments(const Inputs& in) {
    TORCH_CHECK_VALUE(in.query.dim() == 2, "query must be (B, d), got ", in.query.sizes());
    const int64_t rows = in.query.size(0), width = in.query.size(1);
    TORCH_CHECK_VALUE(width <= kMostWidth, "d must be at most ", kMostWidth, ", got ", width);
    catalog = matrix_of("catalog", in.catalog, width);
    TORCH_CHECK_VALUE(catalog.size(0) < std::numeric_limits<int32_t>::max(),
                      "catalog must hold fewer than 2^31 - 1 items, got ", catalog.size(0));
    check_sizes("target", in.target, rows);
    target = ids_of("target", in.target).to(at::kLong);
    negatives = ids_of("negatives", in.negatives);
    TORCH_CHECK_VALUE(negatives.dim() == 1 || (negatives.dim() == 2 && negatives.size(0) == rows),
                      "negatives must be (", rows, ", n) or (n,), got ", negatives.sizes());
    if (in.positives) {
      TORCH_CHECK_VALUE(in.positives->dim() == 2 && in.positives->size(0) == rows, "positives must be (", rows,
                        ", P), got ", in.positives->sizes());
      positives = ids_of("positives", *in.positives).to(at::kLong);
    }
    bias = as_floats("bias", in.bias, catalog.size(0));
    log_q = as_floats("log_q", in.log_q, catalog.size(0));
    // A row whose target is ignored may hold anything.
    ignored = target.eq(in.ignore_index);
    query = matrix_of("query", in.query, width).masked_fill(ignored.unsqueeze(1), 0);
    const Format precision = precision_of(in.precision, query, catalog);
    query = rounded(query, precision);
    if (in.temperature_tensor) {
      TORCH_CHECK_VALUE(in.temperature_tensor->numel() == 1, "temperature must hold one number, got ",
                        in.temperature_tensor->sizes());
      temperature = in.temperature_tensor->detach().to(at::kFloat).contiguous();
    }
    const int64_t stride = catalog.size(0) > 1 ? catalog.stride(0) : width;
    problem.query = query.const_data_ptr<float>();
    problem.catalog = catalog.const_data_ptr();
    problem.stride = stride;
    problem.kind = kind_of(catalog, precision);
    problem.aligned =
        reinterpret_cast<uintptr_t>(problem.catalog) % 16 == 0 && stride * bytes_of(format_of(catalog)) % 16 == 0;
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
    problem.positive_weight = static_cast<float>(in.positive_weight);
    problem.temperature = static_cast<float>(in.temperature);
    problem.temperature_at = data_or_null(temperature);
    problem.ignore_index = in.ignore_index;
  }
  Arguments(const Arguments&) = delete;

  int64_t num_pos() const { return 1 + problem.num_positives; }
  int64_t saved_bytes() const { return problem.rows * (problem.count + num_pos()) * sizeof(float); }
  at::Tensor floats(at::IntArrayRef sizes) const { return at::empty(sizes, query.options()); }

  // (B (1 + P) + negatives,) int32: the item of each entry of Sorted; V where it is none.
  at::Tensor entries() const {
    const at::Tensor first = target.unsqueeze(1);
    const at::Tensor pos_ids = positives.defined() ? at::cat({first, positives}, 1) : first;
    const at::Tensor none = ignored.unsqueeze(1).logical_or(first.lt(0));
    const at::Tensor ids = at::cat({pos_ids.masked_fill(none, -1).flatten(), negatives.flatten().to(at::kLong)});
    const at::Tensor bad = ids.lt(0).logical_or_(ids.ge(problem.items));
    return ids.masked_fill(bad, problem.items).to(at::kInt);
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> sampled_softmax(
    const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target, const at::Tensor& negatives,
    const OptionalTensor& log_q, const OptionalTensor& positives, double positive_weight, double temperature,
    const OptionalTensor& temperature_tensor, const OptionalTensor& bias, int64_t ignore_index,
    bool /* sparse_grad: for the backward pass */, c10::string_view precision, int64_t saved_size, bool check) {
  const c10::DeviceGuard guard(query.device());
  const Arguments arguments({query, catalog, target, negatives, log_q, positives, positive_weight, temperature,
                             temperature_tensor, bias, ignore_index, precision});
  const SampledSoftmax& p = arguments.problem;
  if (check) {
    if (arguments.temperature) {
      const float value = arguments.temperature->item<float>();
      TORCH_CHECK_VALUE(value > 0, "temperature must be above 0, got ", value);
    }
    check_ids("target", target, ignore_index, p.items);
    check_ids("neg", negatives, -1, p.items);
    if (positives) check_ids("positives", *positives, -1, p.items);
    if (bias) {
      check_not_masked("target", arguments.target, arguments.ignored, *arguments.bias);
      if (positives) check_not_masked("positives", arguments.positives, arguments.ignored, *arguments.bias);
    }
  }
  const at::Tensor losses = arguments.floats({p.rows}), lse = arguments.floats({p.rows});
  const at::Tensor saved = at::empty({saved_size}, query.options().dtype(at::kByte));
  const bool saves = saved_size > 0 && saved_size >= arguments.saved_bytes();
  float* logits = saves ? static_cast<float*>(saved.data_ptr()) : nullptr;
  const at::Tensor fault = check ? at::full({1}, -1, target.options().dtype(at::kLong)) : at::Tensor();
  forward(p,
          {logits, saves ? logits + p.rows * p.count : nullptr, losses.data_ptr<float>(), lse.data_ptr<float>(),
           check ? reinterpret_cast<uint64_t*>(fault.data_ptr<int64_t>()) : nullptr},
          stream_of(query));
  const uint64_t first_fault = check ? static_cast<uint64_t>(fault.item<int64_t>()) : kNoFault;
  const uint32_t bits = static_cast<uint32_t>(first_fault);
  float score;
  std::memcpy(&score, &bits, sizeof(score));  // torch before 2.13 compiles extensions as C++17, without std::bit_cast
  TORCH_CHECK_VALUE(first_fault == kNoFault, "scores: row ", first_fault >> 32, " has a score of ", score,
                    ", expected a finite one");
  return {losses, lse, saved};
}

// -> gradients of query, catalog and bias, and the items whose rows the catalog's holds: none where it holds all.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sampled_softmax_backward(
    const at::Tensor& grad_losses, const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target,
    const at::Tensor& negatives, const OptionalTensor& log_q, const OptionalTensor& positives, double positive_weight,
    double temperature, const OptionalTensor& temperature_tensor, const OptionalTensor& bias, int64_t ignore_index,
    bool sparse, c10::string_view precision, const at::Tensor& lse, const at::Tensor& saved, c10::List<bool> needs) {
  const c10::DeviceGuard guard(query.device());
  const cudaStream_t stream = stream_of(query);
  const Arguments arguments({query, catalog, target, negatives, log_q, positives, positive_weight, temperature,
                             temperature_tensor, bias, ignore_index, precision});
  const SampledSoftmax& p = arguments.problem;
  TORCH_CHECK_VALUE(saved.numel() >= arguments.saved_bytes(), "saved must hold ", arguments.saved_bytes(),
                    " bytes from the forward pass, got ", saved.numel());
  const at::Tensor grad = floats_of("grad_losses", grad_losses, p.rows), dense_lse = floats_of("lse", lse, p.rows);
  const at::Tensor dense_saved = saved.contiguous();
  const at::Tensor weights = arguments.floats({p.rows}), pos_dlogits = arguments.floats({p.rows, arguments.num_pos()});
  const auto* logits = static_cast<const float*>(dense_saved.const_data_ptr());
  const DLogits x{logits,
                  logits + p.rows * p.count,
                  dense_lse.const_data_ptr<float>(),
                  grad.const_data_ptr<float>(),
                  weights.data_ptr<float>(),
                  pos_dlogits.data_ptr<float>()};
  dlogits(p, x, stream);

  at::Tensor grad_query = arguments.floats({0}), grad_catalog, grad_bias;
  at::Tensor items = at::empty({0}, target.options().dtype(at::kLong));
  if (needs[0]) {
    grad_query = arguments.floats({p.rows, p.width});
    query_gradient(p, x, grad_query.data_ptr<float>(), stream);
  }
  // Atomics would round a 16-bit gradient at every addition, and leave no list of the touched rows.
  const bool atomics =
      !p.shared && !sparse && format_of(catalog) == Format::kF32 && !at::globalContext().deterministicAlgorithms();
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
    // Rows without entries are not written; a sparse gradient has none of these.
    if (needs[1]) grad_catalog = at::zeros({limit, p.width}, catalog.options());
    if (needs[2]) grad_bias = at::zeros({limit}, query.options().dtype(at::kFloat));
    at::Tensor shared_rows, shared_totals;
    if (p.shared) {
      shared_rows = arguments.floats({p.count, p.width});
      shared_totals = arguments.floats({p.count});
      shared_gradient(p, x, {shared_rows.data_ptr<float>(), shared_totals.data_ptr<float>()}, stream);
    }
    const at::Tensor scratch = arguments.floats({segment_scratch(rows.numel(), p.width)});
    const Sorted sorted{rows.const_data_ptr<int32_t>(), order.const_data_ptr<int64_t>(), rows.numel(),
                        static_cast<int32_t>(limit)};
    const RowGradients out{needs[1] ? grad_catalog.data_ptr() : nullptr, format_of(catalog),
                           data_or_null<float>(grad_bias)};
    segment_gradients(p, x, {data_or_null<float>(shared_rows), data_or_null<float>(shared_totals)}, sorted,
                      scratch.data_ptr<float>(), out, stream);
    if (sparse && needs[2]) {
      grad_bias = at::zeros({p.items}, grad_bias.options()).index_copy_(0, items, grad_bias);
    }
  }
  if (!grad_catalog.defined()) grad_catalog = at::empty({0}, catalog.options());
  if (!grad_bias.defined()) grad_bias = arguments.floats({0});
  // needs[3]: those of query and bias in float32, for the temperature's.
  if (!needs[3]) {
    grad_query = grad_query.to(query.scalar_type());
    if (bias) grad_bias = grad_bias.to(bias->scalar_type());
  }
  return {grad_query, grad_catalog, grad_bias, items};
}

}  // namespace
}  // namespace alterrec::cuda

TORCH_LIBRARY_IMPL(alterrec_fast, CUDA, m) {
  m.impl("native_sampled_softmax", &alterrec::cuda::sampled_softmax);
  m.impl("native_sampled_softmax_backward", &alterrec::cuda::sampled_softmax_backward);
}
