// The losses for the dispatcher: tensors in and out. Schemas, fakes and autograd are registered from Python.
#include <ATen/ATen.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <optional>
#include <tuple>

#include "check.h"
#include "cpu/streamed_loss.h"

namespace alterrec {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Uninitialised memory in huge pages where the system has them: a gradient or a kept product is written once, and
// faulting in its pages one by one would take about as long as that.
at::Tensor empty_large(at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor out = at::empty(sizes, at::TensorOptions().dtype(dtype));
#ifdef __linux__
  constexpr uintptr_t kHuge = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(out.data_ptr()) + kHuge - 1) / kHuge * kHuge;
  const auto end = (reinterpret_cast<uintptr_t>(out.data_ptr()) + out.nbytes()) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may fail
#endif
  return out;
}

Matrix matrix(const at::Tensor& x) {
  return {x.const_data_ptr(), x.scalar_type() == at::kBFloat16, x.size(0), x.size(1),
          x.size(0) > 1 ? x.stride(0) : x.size(1)};
}

const float* data_or_null(const OptionalTensor& x) { return x ? x->const_data_ptr<float>() : nullptr; }

OptionalTensor as_floats(const OptionalTensor& x) {
  return x ? OptionalTensor(x->detach().to(at::kFloat).contiguous()) : std::nullopt;
}

// A problem together with the tensors that it points into.
struct Arguments {
  at::Tensor target, positives;
  OptionalTensor bias, log_q;
  LossProblem problem;

  Arguments(const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target_,
            const OptionalTensor& positives_, double positive_weight, double temperature, const OptionalTensor& bias_,
            const OptionalTensor& log_q_, int64_t first_item, int64_t ignore_index, bool bf16, bool check)
      : target(target_.to(at::kLong).contiguous()), bias(as_floats(bias_)), log_q(as_floats(log_q_)) {
    check_matrix("query", query, query.size(-1));
    check_matrix("catalog", catalog, query.size(1));
    check_vector("target", target, query.size(0));
    if (positives_) positives = positives_->to(at::kLong).contiguous();
    problem = {matrix(query),
               matrix(catalog),
               bf16,
               target.const_data_ptr<int64_t>(),
               positives_ ? positives.const_data_ptr<int64_t>() : nullptr,
               positives_ ? positives.size(1) : 0,
               data_or_null(bias),
               data_or_null(log_q),
               positive_weight,
               static_cast<float>(temperature),
               first_item,
               ignore_index,
               check};
  }
  Arguments(const Arguments&) = delete;
};

// Runs `body`, with errors in values raised as Python's ValueError.
template <class Body>
void raising(const Body& body) {
  try {
    body();
  } catch (const ValueError& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

// (count,) of bias / temperature, what a bias adds to the logits.
at::Tensor shift_of(const LossProblem& problem) {
  at::Tensor shift = at::empty({problem.bias ? problem.catalog.rows : 0}, at::kFloat);
  for (int64_t i = 0; i < shift.numel(); ++i) shift.data_ptr<float>()[i] = problem.bias[i] / problem.temperature;
  return shift;
}

Members members_of(const OptionalTensor& members) {
  Members out;
  if (members && members->scalar_type() == at::kByte) {
    out.bits = members->const_data_ptr<uint8_t>();
    out.bits_stride = members->size(1);
  } else if (members) {
    out.ids = members->const_data_ptr<int32_t>();
    out.ids_width = members->size(1);
  }
  return out;
}

OptionalTensor contiguous(const OptionalTensor& x) { return x ? OptionalTensor(x->contiguous()) : std::nullopt; }

std::tuple<at::Tensor, at::Tensor, at::Tensor> slice_cross_entropy(
    const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target, const OptionalTensor& members_,
    const OptionalTensor& positives, double positive_weight, double temperature, const OptionalTensor& bias,
    int64_t first_item, int64_t ignore_index, int64_t kept_size, bool bf16, bool check) {
  const OptionalTensor members = contiguous(members_);
  at::Tensor losses = at::empty({query.size(0)}, at::kFloat), log_partition = at::empty_like(losses);
  at::Tensor kept = empty_large({kept_size}, at::kByte);
  raising([&] {
    const Arguments arguments(query, catalog, target, positives, positive_weight, temperature, bias, std::nullopt,
                              first_item, ignore_index, bf16, check);
    const at::Tensor shift = shift_of(arguments.problem);
    const Columns columns{catalog.size(0), nullptr, shift.numel() ? shift.const_data_ptr<float>() : nullptr};
    const StreamedLoss loss(arguments.problem, columns, members_of(members));
    loss.forward(kept.data_ptr<uint8_t>(), kept_size, losses.data_ptr<float>(), log_partition.data_ptr<float>());
  });
  return {losses, log_partition, kept};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> slice_cross_entropy_backward(
    const at::Tensor& grad_losses, const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target,
    const OptionalTensor& members_, const OptionalTensor& positives, double positive_weight, double temperature,
    const OptionalTensor& bias, int64_t first_item, int64_t ignore_index, bool bf16, const at::Tensor& log_partition,
    const at::Tensor& kept, c10::List<bool> needs) {
  const OptionalTensor members = contiguous(members_);
  at::Tensor grad_query = at::empty({0}, query.options()), grad_catalog = at::empty({0}, catalog.options());
  at::Tensor grad_bias = at::empty({0}, at::kFloat);
  if (needs[0]) grad_query = at::empty({query.size(0), query.size(1)}, query.options());
  if (needs[1]) grad_catalog = empty_large({catalog.size(0), catalog.size(1)}, catalog.scalar_type());
  if (needs[2]) grad_bias = at::empty({catalog.size(0)}, at::kFloat);
  const at::Tensor grad = grad_losses.to(at::kFloat).contiguous();
  raising([&] {
    const Arguments arguments(query, catalog, target, positives, positive_weight, temperature, bias, std::nullopt,
                              first_item, ignore_index, bf16, false);
    const at::Tensor shift = shift_of(arguments.problem);
    const Columns columns{catalog.size(0), nullptr, shift.numel() ? shift.const_data_ptr<float>() : nullptr};
    const Gradients gradients{needs[0] ? grad_query.data_ptr() : nullptr, needs[1] ? grad_catalog.data_ptr() : nullptr,
                              needs[2] ? grad_bias.data_ptr<float>() : nullptr,
                              query.scalar_type() == at::kBFloat16, catalog.scalar_type() == at::kBFloat16};
    StreamedLoss loss(arguments.problem, columns, members_of(members));
    loss.backward(grad.const_data_ptr<float>(), log_partition.const_data_ptr<float>(),
                  kept.const_data_ptr<uint8_t>(), kept.numel(), gradients);
  });
  return {grad_query, grad_catalog, bias ? grad_bias.to(bias->scalar_type()) : grad_bias};
}

}  // namespace
}  // namespace alterrec

TORCH_LIBRARY_IMPL(alterrec_fast, CPU, m) {
  m.impl("slice_cross_entropy", &alterrec::slice_cross_entropy);
  m.impl("slice_cross_entropy_backward", &alterrec::slice_cross_entropy_backward);
}
