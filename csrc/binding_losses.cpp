// The losses for the dispatcher: tensors in and out. Schemas, fakes and autograd are registered from Python.
#include "binding_losses.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/gathered_loss.h"
#include "cpu/shared_negatives.h"
#include "recycle.h"

namespace alterrec {
namespace {

// The negatives of sampled_softmax, (B, n) or (n,), dense.
struct Sampled {
  at::Tensor tensor;
  bool shared;
  Negatives negatives;

  Sampled(const at::Tensor& sampled, int64_t rows)
      : tensor(ids_of("negatives", sampled)), shared(sampled.dim() == 1), negatives{ids(tensor), sampled.size(-1)} {
    TORCH_CHECK_VALUE(shared || (sampled.dim() == 2 && sampled.size(0) == rows), "negatives must be (", rows,
                      ", n) or (n,), got ", sampled.sizes());
  }
  Sampled(const Sampled&) = delete;
};

// The outputs of a forward pass.
struct Forward {
  at::Tensor losses, lse, saved;

  Forward(int64_t rows, int64_t saved_size)
      : losses(at::empty({rows}, at::kFloat)),
        lse(at::empty({rows}, at::kFloat)),
        saved(recycled_empty({saved_size}, at::kByte)) {}

  void run(const DenseLoss& loss) {
    loss.forward(saved.data_ptr<uint8_t>(), saved.numel(), losses.data_ptr<float>(), lse.data_ptr<float>());
  }
  void run(const GatheredLoss& loss) {
    uint8_t* space = saved.numel() > 0 && saved.numel() >= loss.saved_bytes() ? saved.data_ptr<uint8_t>() : nullptr;
    loss.forward(space, losses.data_ptr<float>(), lse.data_ptr<float>());
  }
  std::tuple<at::Tensor, at::Tensor, at::Tensor> result() const { return {losses, lse, saved}; }
};

// The outputs of a backward pass; empty where they are not needed. (rows, d) is the shape of the catalog's. needs[3]:
// those of query and bias are in float32, else in their input's dtype.
struct Backward {
  at::Tensor query, catalog, bias;
  Gradients gradients;

  Backward(const at::Tensor& query_, const at::Tensor& catalog_, int64_t rows, const c10::List<bool>& needs)
      : query(at::empty({0}, needs[3] ? at::kFloat : query_.scalar_type())),
        catalog(at::empty({0}, catalog_.options())),
        bias(at::empty({0})) {
    if (needs[0]) query = at::empty({query_.size(0), query_.size(1)}, query.options());
    if (needs[1]) catalog = recycled_empty({rows, catalog_.size(1)}, catalog_.scalar_type());
    if (needs[2]) bias = at::empty({rows}, at::kFloat);
    gradients = {needs[0] ? query.data_ptr() : nullptr, needs[1] ? catalog.data_ptr() : nullptr,
                 needs[2] ? bias.data_ptr<float>() : nullptr, format_of(query), format_of(catalog)};
  }

  // grad, of the bias, in the dtype that is asked for.
  static at::Tensor bias_gradient(const at::Tensor& grad, const OptionalTensor& bias, const c10::List<bool>& needs) {
    return bias && !needs[3] ? grad.to(bias->scalar_type()) : grad;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> slice_cross_entropy(
    const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target, const OptionalTensor& members,
    const OptionalTensor& positives, double positive_weight, double temperature,
    const OptionalTensor& temperature_tensor, const OptionalTensor& bias, int64_t first_item, int64_t ignore_index,
    c10::string_view precision, int64_t saved_size, bool check) {
  Forward forward(query.size(0), saved_size);
  raising([&] {
    const Arguments arguments({query, catalog, target, positives, bias, std::nullopt, positive_weight, temperature,
                               temperature_tensor, first_item, ignore_index, precision, check});
    const int64_t items = catalog.size(0);
    const Slice slice(members, query.size(0), items);
    if (check) slice.check_order(first_item, items);
    if (slice.members.few(items)) {
      forward.run(GatheredLoss(arguments.problem, slice.negatives()));
    } else {
      const ItemColumns all(arguments.problem);
      forward.run(DenseLoss(arguments.problem, all.columns, slice.members));
    }
  });
  return forward.result();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> slice_cross_entropy_backward(
    const at::Tensor& grad_losses, const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target,
    const OptionalTensor& members, const OptionalTensor& positives, double positive_weight, double temperature,
    const OptionalTensor& temperature_tensor, const OptionalTensor& bias, int64_t first_item, int64_t ignore_index,
    c10::string_view precision, const at::Tensor& lse, const at::Tensor& saved, c10::List<bool> needs) {
  const int64_t rows = query.size(0), items = catalog.size(0);
  const FromForward from(grad_losses, lse, saved, rows);
  Backward backward(query, catalog, items, needs);
  raising([&] {
    const Arguments arguments({query, catalog, target, positives, bias, std::nullopt, positive_weight, temperature,
                               temperature_tensor, first_item, ignore_index, precision, false});
    const Slice slice(members, rows, items);
    int64_t saved_size = from.saved.numel();
    if (slice.members.few(items)) {
      GatheredLoss loss(arguments.problem, slice.negatives());
      if (saved_size >= loss.saved_bytes()) {
        loss.backward(from.grads(), from.lses(), from.bytes(), nullptr, backward.gradients);
        return;
      }
      saved_size = 0;  // there was no room for what the gathered form saves
    }
    const ItemColumns all(arguments.problem);
    DenseLoss loss(arguments.problem, all.columns, slice.members);
    loss.backward(from.grads(), from.lses(), from.bytes(), saved_size, backward.gradients);
  });
  return {backward.query, backward.catalog, Backward::bias_gradient(backward.bias, bias, needs)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sampled_softmax(
    const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target, const at::Tensor& negatives,
    const OptionalTensor& log_q, const OptionalTensor& positives, double positive_weight, double temperature,
    const OptionalTensor& temperature_tensor, const OptionalTensor& bias, int64_t ignore_index,
    bool /* sparse_grad: for the backward pass */, c10::string_view precision, int64_t saved_size, bool check) {
  Forward forward(query.size(0), saved_size);
  raising([&] {
    const Arguments arguments({query, catalog, target, positives, bias, log_q, positive_weight, temperature,
                               temperature_tensor, 0, ignore_index, precision, check});
    const Sampled sampled(negatives, query.size(0));
    if (sampled.shared) {
      const SharedNegatives shared(arguments.problem, sampled.negatives);
      forward.run(DenseLoss(arguments.problem, shared.columns(), shared.members()));
    } else {
      forward.run(GatheredLoss(arguments.problem, sampled.negatives));
    }
  });
  return forward.result();
}

// -> gradients of query, catalog and bias, and the items whose rows the catalog's holds: none where it holds all.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sampled_softmax_backward(
    const at::Tensor& grad_losses, const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target,
    const at::Tensor& negatives, const OptionalTensor& log_q, const OptionalTensor& positives, double positive_weight,
    double temperature, const OptionalTensor& temperature_tensor, const OptionalTensor& bias, int64_t ignore_index,
    bool sparse, c10::string_view precision, const at::Tensor& lse, const at::Tensor& saved, c10::List<bool> needs) {
  const int64_t rows = query.size(0), all_items = catalog.size(0);
  const FromForward from(grad_losses, lse, saved, rows);
  std::optional<Backward> backward;
  std::vector<int64_t> items;
  raising([&] {
    const Arguments arguments({query, catalog, target, positives, bias, log_q, positive_weight, temperature,
                               temperature_tensor, 0, ignore_index, precision, false});
    const Sampled sampled(negatives, rows);
    if (sampled.shared) {
      const SharedNegatives shared(arguments.problem, sampled.negatives);
      if (sparse) items = shared.items();
      backward.emplace(query, catalog, sparse ? static_cast<int64_t>(items.size()) : all_items, needs);
      if (!sparse) {
        backward->catalog.zero_();
        backward->bias.zero_();
      }
      DenseLoss loss(arguments.problem, shared.columns(), shared.members());
      loss.backward(from.grads(), from.lses(), from.bytes(), from.saved.numel(), backward->gradients, !sparse);
    } else {
      GatheredLoss loss(arguments.problem, sampled.negatives);
      TORCH_CHECK_VALUE(from.saved.numel() >= loss.saved_bytes(), "saved must hold ", loss.saved_bytes(),
                        " bytes from the forward pass, got ", from.saved.numel());
      if (sparse) items = loss.touched();
      backward.emplace(query, catalog, sparse ? static_cast<int64_t>(items.size()) : all_items, needs);
      loss.backward(from.grads(), from.lses(), from.bytes(), sparse ? &items : nullptr, backward->gradients);
    }
  });
  const at::Tensor ids = at::tensor(items, at::kLong);
  at::Tensor grad_bias = backward->bias;
  if (sparse && needs[2]) grad_bias = at::zeros({all_items}).index_copy_(0, ids, grad_bias);
  return {backward->query, backward->catalog, Backward::bias_gradient(grad_bias, bias, needs), ids};
}

}  // namespace
}  // namespace alterrec

TORCH_LIBRARY_IMPL(alterrec_fast, CPU, m) {
  m.impl("native_slice_cross_entropy", &alterrec::slice_cross_entropy);
  m.impl("native_slice_cross_entropy_backward", &alterrec::slice_cross_entropy_backward);
  m.impl("native_sampled_softmax", &alterrec::sampled_softmax);
  m.impl("native_sampled_softmax_backward", &alterrec::sampled_softmax_backward);
}
