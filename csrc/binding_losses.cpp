// The losses for the dispatcher: tensors in and out. Schemas, fakes and autograd are registered from Python.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "check.h"
#include "cpu/gathered_loss.h"
#include "cpu/shared_negatives.h"
#include "cpu/streamed_loss.h"
#include "recycle.h"

namespace alterrec {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

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
    out.form = Members::Form::kBits;
    out.bits = members->const_data_ptr<uint8_t>();
    out.bits_stride = members->size(1);
  } else if (members) {
    out.form = Members::Form::kIds;
    out.ids = members->const_data_ptr<int32_t>();
    out.ids_width = members->size(1);
  }
  return out;
}

OptionalTensor contiguous(const OptionalTensor& x) { return x ? OptionalTensor(x->contiguous()) : std::nullopt; }

// Whether a slice's ids are read one by one, or scored together with all other items.
bool gathers(const Members& members, int64_t items) {
  constexpr int64_t kCrossover = 16;  // benchmarks/native_losses.py measures it
  return members.form == Members::Form::kIds && members.ids_width * kCrossover <= items;
}

Negatives negatives_of(const at::Tensor& ids) {
  Negatives out;
  out.count = ids.size(-1);
  if (ids.scalar_type() == at::kInt) {
    out.narrow = ids.const_data_ptr<int32_t>();
  } else {
    out.wide = ids.const_data_ptr<int64_t>();
  }
  return out;
}

// The outputs of a forward pass.
struct Forward {
  at::Tensor losses, log_partition, kept;

  Forward(int64_t rows, int64_t kept_size)
      : losses(at::empty({rows}, at::kFloat)),
        log_partition(at::empty({rows}, at::kFloat)),
        kept(recycled_empty({kept_size}, at::kByte)) {}

  void run(const StreamedLoss& loss) {
    loss.forward(kept.data_ptr<uint8_t>(), kept.numel(), losses.data_ptr<float>(), log_partition.data_ptr<float>());
  }
  void run(const GatheredLoss& loss) {
    uint8_t* space = kept.numel() > 0 && kept.numel() >= loss.kept_bytes() ? kept.data_ptr<uint8_t>() : nullptr;
    loss.forward(space, losses.data_ptr<float>(), log_partition.data_ptr<float>());
  }
  std::tuple<at::Tensor, at::Tensor, at::Tensor> result() const { return {losses, log_partition, kept}; }
};

// The outputs of a backward pass; empty where they are not needed. (rows, d) is the shape of the catalog's.
struct Backward {
  at::Tensor query, catalog, bias;
  Gradients gradients;

  Backward(const at::Tensor& query_, const at::Tensor& catalog_, int64_t rows, const c10::List<bool>& needs)
      : query(at::empty({0}, query_.options())), catalog(at::empty({0}, catalog_.options())), bias(at::empty({0})) {
    if (needs[0]) query = at::empty({query_.size(0), query_.size(1)}, query_.options());
    if (needs[1]) catalog = recycled_empty({rows, catalog_.size(1)}, catalog_.scalar_type());
    if (needs[2]) bias = at::empty({rows}, at::kFloat);
    gradients = {needs[0] ? query.data_ptr() : nullptr, needs[1] ? catalog.data_ptr() : nullptr,
                 needs[2] ? bias.data_ptr<float>() : nullptr, query.scalar_type() == at::kBFloat16,
                 catalog.scalar_type() == at::kBFloat16};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> slice_cross_entropy(
    const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target, const OptionalTensor& members_,
    const OptionalTensor& positives, double positive_weight, double temperature, const OptionalTensor& bias,
    int64_t first_item, int64_t ignore_index, int64_t kept_size, bool bf16, bool check) {
  const OptionalTensor tensor = contiguous(members_);
  const Members members = members_of(tensor);
  Forward forward(query.size(0), kept_size);
  raising([&] {
    const Arguments arguments(query, catalog, target, positives, positive_weight, temperature, bias, std::nullopt,
                              first_item, ignore_index, bf16, check);
    if (gathers(members, catalog.size(0))) {
      forward.run(GatheredLoss(arguments.problem, negatives_of(*tensor)));
      return;
    }
    const at::Tensor shift = shift_of(arguments.problem);
    const Columns columns{catalog.size(0), nullptr, shift.numel() ? shift.const_data_ptr<float>() : nullptr};
    forward.run(StreamedLoss(arguments.problem, columns, members));
  });
  return forward.result();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> slice_cross_entropy_backward(
    const at::Tensor& grad_losses, const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target,
    const OptionalTensor& members_, const OptionalTensor& positives, double positive_weight, double temperature,
    const OptionalTensor& bias, int64_t first_item, int64_t ignore_index, bool bf16, const at::Tensor& log_partition,
    const at::Tensor& kept, c10::List<bool> needs) {
  const OptionalTensor tensor = contiguous(members_);
  const Members members = members_of(tensor);
  Backward backward(query, catalog, catalog.size(0), needs);
  const at::Tensor grad = grad_losses.to(at::kFloat).contiguous();
  raising([&] {
    const Arguments arguments(query, catalog, target, positives, positive_weight, temperature, bias, std::nullopt,
                              first_item, ignore_index, bf16, false);
    int64_t kept_size = kept.numel();
    if (gathers(members, catalog.size(0))) {
      GatheredLoss loss(arguments.problem, negatives_of(*tensor));
      if (kept_size >= loss.kept_bytes()) {
        loss.backward(grad.const_data_ptr<float>(), log_partition.const_data_ptr<float>(),
                      kept.const_data_ptr<uint8_t>(), nullptr, backward.gradients);
        return;
      }
      kept_size = 0;  // there was no room for what the gathered form keeps
    }
    const at::Tensor shift = shift_of(arguments.problem);
    const Columns columns{catalog.size(0), nullptr, shift.numel() ? shift.const_data_ptr<float>() : nullptr};
    StreamedLoss loss(arguments.problem, columns, members);
    loss.backward(grad.const_data_ptr<float>(), log_partition.const_data_ptr<float>(), kept.const_data_ptr<uint8_t>(),
                  kept_size, backward.gradients);
  });
  return {backward.query, backward.catalog, bias ? backward.bias.to(bias->scalar_type()) : backward.bias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sampled_softmax(
    const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target, const at::Tensor& negatives_,
    const OptionalTensor& log_q, const OptionalTensor& positives, double positive_weight, double temperature,
    const OptionalTensor& bias, int64_t ignore_index, bool /* sparse_grad: for the backward pass */, int64_t kept_size,
    bool bf16, bool check) {
  const at::Tensor negatives = negatives_.contiguous();
  Forward forward(query.size(0), kept_size);
  raising([&] {
    const Arguments arguments(query, catalog, target, positives, positive_weight, temperature, bias, log_q, 0,
                              ignore_index, bf16, check);
    if (negatives.dim() == 2) {
      forward.run(GatheredLoss(arguments.problem, negatives_of(negatives)));
    } else {
      const SharedNegatives shared(arguments.problem, negatives_of(negatives));
      forward.run(StreamedLoss(arguments.problem, shared.columns(), shared.members()));
    }
  });
  return forward.result();
}

// -> gradients of query, catalog and bias, and the items whose rows the catalog's holds: none where it holds all.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sampled_softmax_backward(
    const at::Tensor& grad_losses, const at::Tensor& query, const at::Tensor& catalog, const at::Tensor& target,
    const at::Tensor& negatives_, const OptionalTensor& log_q, const OptionalTensor& positives, double positive_weight,
    double temperature, const OptionalTensor& bias, int64_t ignore_index, bool sparse, bool bf16,
    const at::Tensor& log_partition, const at::Tensor& kept, c10::List<bool> needs) {
  const at::Tensor negatives = negatives_.contiguous();
  const at::Tensor grad = grad_losses.to(at::kFloat).contiguous();
  const float* grads = grad.const_data_ptr<float>();
  const float* partition = log_partition.const_data_ptr<float>();
  std::optional<Backward> backward;
  std::vector<int64_t> items;
  raising([&] {
    const Arguments arguments(query, catalog, target, positives, positive_weight, temperature, bias, log_q, 0,
                              ignore_index, bf16, false);
    if (negatives.dim() == 2) {
      GatheredLoss loss(arguments.problem, negatives_of(negatives));
      if (sparse) items = loss.touched();
      backward.emplace(query, catalog, sparse ? static_cast<int64_t>(items.size()) : catalog.size(0), needs);
      loss.backward(grads, partition, kept.const_data_ptr<uint8_t>(), sparse ? &items : nullptr, backward->gradients);
    } else {
      const SharedNegatives shared(arguments.problem, negatives_of(negatives));
      if (sparse) items = shared.items();
      backward.emplace(query, catalog, sparse ? static_cast<int64_t>(items.size()) : catalog.size(0), needs);
      if (!sparse) {
        backward->catalog.zero_();
        backward->bias.zero_();
      }
      StreamedLoss loss(arguments.problem, shared.columns(), shared.members());
      loss.backward(grads, partition, kept.const_data_ptr<uint8_t>(), kept.numel(), backward->gradients, !sparse);
    }
  });
  const at::Tensor ids = at::tensor(items, at::kLong);
  at::Tensor grad_bias = backward->bias;
  if (sparse && needs[2]) grad_bias = at::zeros({catalog.size(0)}).index_copy_(0, ids, grad_bias);
  return {backward->query, backward->catalog, bias ? grad_bias.to(bias->scalar_type()) : grad_bias, ids};
}

}  // namespace
}  // namespace alterrec

TORCH_LIBRARY_IMPL(alterrec_fast, CPU, m) {
  m.impl("slice_cross_entropy", &alterrec::slice_cross_entropy);
  m.impl("slice_cross_entropy_backward", &alterrec::slice_cross_entropy_backward);
  m.impl("sampled_softmax", &alterrec::sampled_softmax);
  m.impl("sampled_softmax_backward", &alterrec::sampled_softmax_backward);
}
