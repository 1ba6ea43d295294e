// What the bindings of the losses and of item tables share: tensors, checked, as the kernels take them.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "check.h"
#include "cpu/dense_loss.h"
#include "cpu/gathered_loss.h"

namespace alterrec {

using OptionalTensor = std::optional<at::Tensor>;

// The query with zeros in the rows whose target is ignored, which may hold anything.
inline at::Tensor without_ignored(const at::Tensor& query, const at::Tensor& target, int64_t ignore_index) {
  const int64_t *begin = target.const_data_ptr<int64_t>(), *end = begin + target.numel();
  if (std::find(begin, end, ignore_index) == end) return query;
  return query.masked_fill(target.eq(ignore_index).unsqueeze(1), 0);
}

inline Ids ids(const at::Tensor& x) {
  Ids out;
  if (x.scalar_type() == at::kInt) {
    out.narrow = x.const_data_ptr<int32_t>();
  } else {
    out.wide = x.const_data_ptr<int64_t>();
  }
  return out;
}

// What both losses are given.
struct Inputs {
  const at::Tensor &query, &catalog, &target;
  const OptionalTensor &positives, &bias, &log_q;
  double positive_weight, temperature;
  const OptionalTensor& temperature_tensor;  // (), in temperature's place
  int64_t first_item, ignore_index;
  c10::string_view precision;
  bool check;
};

inline float temperature_of(const Inputs& in) {
  const auto value = static_cast<float>(in.temperature_tensor ? in.temperature_tensor->item<double>() : in.temperature);
  TORCH_CHECK_VALUE(value > 0 || !in.check, "temperature must be above 0, got ", value);
  return value;
}

// A problem together with the tensors that it points into, checked.
struct Arguments {
  at::Tensor query, catalog, target, positives, bias, log_q;
  LossProblem problem{};

  explicit Arguments(const Inputs& in) {
    TORCH_CHECK_VALUE(in.query.dim() == 2, "query must be (B, d), got ", in.query.sizes());
    const int64_t rows = in.query.size(0), width = in.query.size(1);
    catalog = matrix_of("catalog", in.catalog, width);
    const int64_t items = catalog.size(0);
    check_sizes("target", in.target, rows);
    target = ids_of("target", in.target).to(at::kLong);
    query = without_ignored(matrix_of("query", in.query, width), target, in.ignore_index);
    if (in.positives) {
      TORCH_CHECK_VALUE(in.positives->dim() == 2 && in.positives->size(0) == rows, "positives must be (", rows,
                        ", P), got ", in.positives->sizes());
      positives = ids_of("positives", *in.positives);
      problem.positives = ids(positives);
      problem.num_positives = positives.size(1);
      TORCH_CHECK_VALUE(rows * (1 + problem.num_positives) <= std::numeric_limits<uint32_t>::max(),
                        "positives must be fewer than 2^32, got ", positives.sizes());
    }
    if (in.bias) bias = floats_of("bias", *in.bias, items);
    if (in.log_q) log_q = floats_of("log_q", *in.log_q, items);
    problem.query = matrix(query);
    problem.catalog = matrix(catalog);
    problem.precision = precision_of(in.precision, query, catalog);
    problem.target = target.const_data_ptr<int64_t>();
    problem.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
    problem.log_q = log_q.defined() ? log_q.const_data_ptr<float>() : nullptr;
    problem.positive_weight = in.positive_weight;
    problem.temperature = temperature_of(in);
    problem.first_item = in.first_item;
    problem.ignore_index = in.ignore_index;
    problem.check = in.check;
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

// The negatives of a slice, checked, together with their tensor; all items where there is no slice.
struct Slice {
  at::Tensor tensor;
  Members members;

  Slice(const OptionalTensor& slice, int64_t rows, int64_t items) {
    if (!slice) return;
    if (slice->scalar_type() == at::kByte) {
      check_sizes("neg.bits", *slice, {rows, (items + 63) / 64 * 8});
      tensor = slice->contiguous();
      members.form = Members::Form::kBits;
      members.bits = tensor.const_data_ptr<uint8_t>();
      members.bits_stride = tensor.size(1);
      return;
    }
    TORCH_CHECK_TYPE(slice->scalar_type() == at::kInt, "neg must hold uint8 bits or int32 ids, got ",
                     slice->scalar_type());
    TORCH_CHECK_VALUE(slice->dim() == 2 && slice->size(0) == rows, "neg.ids must be (", rows, ", n), got ",
                      slice->sizes());
    tensor = slice->contiguous();
    members.form = Members::Form::kIds;
    members.ids = tensor.const_data_ptr<int32_t>();
    members.ids_width = tensor.size(1);
  }
  Slice(const Slice&) = delete;

  // Raises ValueError where an id is not in [first_item, items), or ids do not ascend with -1 behind them.
  void check_order(int64_t first_item, int64_t items) const {
    if (members.form != Members::Form::kIds) return;
    for (int64_t row = 0; row < tensor.size(0); ++row) {
      const int32_t* row_ids = members.ids + row * members.ids_width;
      int64_t last = first_item - 1;
      for (int64_t i = 0; i < members.ids_width; ++i) {
        const int64_t id = row_ids[i];
        const bool none = id == -1;
        check_id("neg.ids", row, id, -1, first_item, items);
        TORCH_CHECK_VALUE(none || id > last, "neg.ids: row ", row, " holds ", id, " at place ", i,
                          ", expected ids that ascend, with -1 behind them");
        last = none ? items : id;
      }
    }
  }

  Negatives negatives() const { return {ids(tensor), members.ids_width}; }
};

// What a backward pass gets from the forward pass and from the loss, dense.
struct FromForward {
  at::Tensor grad_losses, lse, saved;

  FromForward(const at::Tensor& grad, const at::Tensor& lse_, const at::Tensor& saved_, int64_t rows)
      : grad_losses(floats_of("grad_losses", grad, rows)),
        lse(floats_of("lse", lse_, rows)),
        saved(saved_.contiguous()) {
    TORCH_CHECK_TYPE(saved.scalar_type() == at::kByte, "saved must be uint8, got ", saved.scalar_type());
  }
  const float* grads() const { return grad_losses.const_data_ptr<float>(); }
  const float* lses() const { return lse.const_data_ptr<float>(); }
  const uint8_t* bytes() const { return saved.const_data_ptr<uint8_t>(); }
};

}  // namespace alterrec
