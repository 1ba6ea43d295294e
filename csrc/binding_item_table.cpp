// Losses over an item table, and its step, for the dispatcher. Schemas and fakes are registered from Python.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "binding_losses.h"
#include "cpu/item_table.h"
#include "recycle.h"

namespace alterrec {
namespace {

// A loss over all rows of the table, with the tensors that it points into.
struct TableLoss {
  Arguments arguments;
  Norm norm;
  Slice slice;
  ItemColumns columns;
  DenseLoss loss;

  TableLoss(const Inputs& in, const OptionalTensor& members, const OptionalTensor& norm_weight,
            const OptionalTensor& norm_bias, double norm_eps)
      : arguments(in),
        norm(norm_weight, norm_bias, norm_eps, in.query.size(1)),
        slice(members, in.query.size(0), in.catalog.size(0)),
        columns(with_norm()),
        loss(arguments.problem, columns.columns, slice.members) {}
  TableLoss(const TableLoss&) = delete;

 private:
  const LossProblem& with_norm() {
    arguments.problem.catalog.norm = norm.get();
    return arguments.problem;
  }
};

// -> losses, log-sum-exp, what is saved for the step, and the mean (B, d) that the query's gradient is made of.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> item_table_loss(
    const at::Tensor& query, const at::Tensor& table, const at::Tensor& target, const OptionalTensor& members,
    const OptionalTensor& positives, double positive_weight, double temperature,
    const OptionalTensor& temperature_tensor, const OptionalTensor& bias, int64_t first_item, int64_t ignore_index,
    c10::string_view precision, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps,
    int64_t saved_size, bool check) {
  const int64_t rows = query.size(0);
  at::Tensor losses = at::empty({rows}, at::kFloat), lse = at::empty({rows}, at::kFloat);
  at::Tensor saved = recycled_empty({saved_size}, at::kByte), mean = at::empty({rows, query.size(1)}, at::kFloat);
  raising([&] {
    const TableLoss made({query, table, target, positives, bias, std::nullopt, positive_weight, temperature,
                          temperature_tensor, first_item, ignore_index, precision, check},
                         members, norm_weight, norm_bias, norm_eps);
    if (check) made.slice.check_order(first_item, table.size(0));
    made.loss.forward(saved.data_ptr<uint8_t>(), saved_size, losses.data_ptr<float>(), lse.data_ptr<float>(),
                      mean.data_ptr<float>());
  });
  return {losses, lse, saved, mean};
}

at::Tensor item_table_query_gradient(const at::Tensor& grad_losses, const at::Tensor& lse, const at::Tensor& mean,
                                     const at::Tensor& query, const at::Tensor& table, const at::Tensor& target,
                                     const OptionalTensor& positives, double positive_weight, double temperature,
                                     const OptionalTensor& temperature_tensor, const OptionalTensor& bias,
                                     int64_t first_item, int64_t ignore_index, c10::string_view precision,
                                     const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                     double norm_eps) {
  at::Tensor out = at::empty(query.sizes(), query.scalar_type());
  const FromForward from(grad_losses, lse, at::empty({0}, at::kByte), query.size(0));
  raising([&] {
    TableLoss made({query, table, target, positives, bias, std::nullopt, positive_weight, temperature,
                    temperature_tensor, first_item, ignore_index, precision, false},
                   std::nullopt, norm_weight, norm_bias, norm_eps);
    made.loss.differentiate(from.grads(), from.lses(), nullptr, 0);
    made.loss.query_gradient(mean.contiguous().const_data_ptr<float>(),
                             {out.data_ptr(), nullptr, nullptr, format_of(out), Format::kF32});
  });
  return out;
}

// One entry of the lists for each loss; empty `first` and `second` where the optimiser has no such moments. ->
// gradients of the norm's weight and bias, empty without a norm.
std::tuple<at::Tensor, at::Tensor> item_table_step(
    const at::Tensor& table, const at::Tensor& first, const at::Tensor& second, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double norm_eps, at::TensorList queries, at::TensorList targets,
    const c10::List<OptionalTensor>& members, const c10::List<OptionalTensor>& positives,
    const c10::List<OptionalTensor>& biases, at::TensorList grad_losses, at::TensorList lses, at::TensorList saved,
    at::ArrayRef<double> positive_weights, at::ArrayRef<double> temperatures, at::IntArrayRef first_items,
    at::IntArrayRef ignore_indices, at::IntArrayRef precisions, const at::Tensor& items, const at::Tensor& grads,
    int64_t kind, double step_size, double root_correction, double beta1, double beta2, double eps, double weight_decay,
    double scale, double clip, bool only_touched, int64_t key) {
  TORCH_CHECK_VALUE(table.dim() == 2 && table.is_contiguous(), "table must be (V, d) and dense, got ", table.sizes());
  const int64_t count = table.size(0), width = table.size(1), entries = items.numel();
  TORCH_CHECK_TYPE(table.scalar_type() == at::kFloat || table.scalar_type() == at::kBFloat16,
                   "table must be float32 or bfloat16, got ", table.scalar_type());
  const auto optimizer = static_cast<Optimizer::Kind>(kind);
  const bool adam = optimizer == Optimizer::Kind::kAdam || optimizer == Optimizer::Kind::kSparseAdam;
  const int64_t numbers = adam ? count * width : optimizer == Optimizer::Kind::kRowwiseAdagrad ? count : 0;
  for (const auto& [name, moment, expected] : {std::tuple("first moments", &first, numbers),
                                               std::tuple("second moments", &second, adam ? numbers : int64_t{0})}) {
    TORCH_CHECK_VALUE(moment->numel() == expected && moment->is_contiguous() && moment->scalar_type() == at::kFloat,
                      name, " must be ", expected, " float32 numbers, got ", moment->sizes());
  }
  check_sizes("items", items, entries);
  check_sizes("grads", grads, {entries, width});
  TORCH_CHECK_TYPE(items.scalar_type() == at::kLong && grads.scalar_type() == at::kFloat,
                   "items and grads must be int64 and float32, got ", items.scalar_type(), " and ",
                   grads.scalar_type());
  const at::Tensor item_list = items.contiguous(), grad_rows = grads.contiguous();
  const int64_t* ids = item_list.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(std::is_sorted(ids, ids + entries) && (entries == 0 || (ids[0] >= 0 && ids[entries - 1] < count)),
                    "items must ascend within [0, ", count, ")");
  const Norm norm(norm_weight, norm_bias, norm_eps, width);
  at::Tensor weight_grad = at::empty({norm.get() ? width : 0}, at::kFloat), bias_grad = at::empty_like(weight_grad);
  raising([&] {
    std::vector<std::unique_ptr<TableLoss>> losses;
    std::vector<FromForward> from;
    from.reserve(queries.size());
    TableStep step{
        {},
        ids,
        grad_rows.const_data_ptr<float>(),
        entries,
        {optimizer, static_cast<float>(step_size), static_cast<float>(root_correction), static_cast<float>(beta2),
         static_cast<float>(1.0 - beta1), static_cast<float>(1.0 - beta2), static_cast<float>(eps),
         static_cast<float>(weight_decay), static_cast<float>(scale), static_cast<float>(clip)},
        only_touched,
        static_cast<uint32_t>(key)};
    for (size_t i = 0; i < queries.size(); ++i) {
      losses.push_back(std::make_unique<TableLoss>(
          Inputs{queries[i], table, targets[i], positives.get(i), biases.get(i), std::nullopt, positive_weights[i],
                 temperatures[i], std::nullopt, first_items[i], ignore_indices[i], kPrecisions[precisions[i]], false},
          members.get(i), norm_weight, norm_bias, norm_eps));
      from.emplace_back(grad_losses[i], lses[i], saved[i], queries[i].size(0));
      losses.back()->loss.differentiate(from[i].grads(), from[i].lses(), from[i].bytes(), from[i].saved.numel());
      step.losses.push_back(&losses.back()->loss);
    }
    float* numbers_first = first.numel() > 0 ? first.data_ptr<float>() : nullptr;
    float* numbers_second = second.numel() > 0 ? second.data_ptr<float>() : nullptr;
    step_table({table.data_ptr(), table.scalar_type() == at::kBFloat16, count, width, numbers_first, numbers_second,
                norm.get()},
               step, weight_grad.data_ptr<float>(), bias_grad.data_ptr<float>());
  });
  return {weight_grad, bias_grad};
}

}  // namespace
}  // namespace alterrec

TORCH_LIBRARY_IMPL(alterrec_fast, CPU, m) {
  m.impl("native_item_table_loss", &alterrec::item_table_loss);
  m.impl("native_item_table_query_gradient", &alterrec::item_table_query_gradient);
  m.impl("native_item_table_step", &alterrec::item_table_step);
}
