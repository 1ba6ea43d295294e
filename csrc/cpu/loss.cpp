#include "cpu/loss.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "cpu/blas.h"
#include "cpu/kernels.h"

namespace alterrec {
namespace {

constexpr int64_t kRowsPerTask = 64;

// log(1 + exp(x)) and its derivative, exact at both ends.
double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }
double sigmoid(double x) { return x >= 0 ? 1.0 / (1.0 + std::exp(-x)) : std::exp(x) / (1.0 + std::exp(x)); }

}  // namespace

void check_id(const char* name, int64_t row, int64_t id, int64_t none, int64_t first, int64_t stop) {
  if (id == none || (id >= first && id < stop)) return;
  std::ostringstream message;
  message << name << ": row " << row << " holds " << id << ", expected " << none << " or an id in [" << first << ", "
          << stop << ")";
  throw ValueError(message.str());
}

void Fault::raise() const {
  if (row < 0) return;
  std::ostringstream message;
  message << "scores: row " << row << " has a score of ";
  if (std::isnan(score)) {
    message << "nan";
  } else {
    message << score;
  }
  message << ", expected a finite one";
  throw ValueError(message.str());
}

Row row_kind(const LossProblem& problem) {
  if (problem.catalog.bf16) return Row::kBF16;
  return problem.bf16 ? Row::kF32Rounded : Row::kF32;
}

void write_row(const float* values, int64_t row, int64_t width, bool bf16, void* out) {
  if (bf16) {
    kernels().narrow(values, width, static_cast<uint16_t*>(out) + row * width);
  } else {
    std::copy_n(values, width, static_cast<float*>(out) + row * width);
  }
}

Wanted::Wanted(const LossProblem& problem, const float* query, int64_t stride)
    : problem_(problem), rows_(problem.query.rows), width_(1 + problem.num_positives) {
  const int64_t stop = problem.catalog.rows;
  items_.resize(rows_ * width_);
  for (int64_t row = 0; row < rows_; ++row) {
    int64_t* items = items_.data() + row * width_;
    const int64_t target = problem.target[row];
    check_id("target", row, target, problem.ignore_index, problem.first_item, stop);
    const bool ignored = target == problem.ignore_index;
    items[0] = ignored ? -1 : target;
    for (int64_t k = 1; k < width_; ++k) {
      const int64_t positive = problem.positives[row * problem.num_positives + k - 1];
      check_id("positives", row, positive, -1, problem.first_item, stop);
      items[k] = ignored ? -1 : positive;
    }
  }
  logits_.resize(items_.size());
  std::vector<Fault> faults((rows_ + kRowsPerTask - 1) / kRowsPerTask);
  const auto dot = loss_kernels().dot_rows[static_cast<int>(row_kind(problem))];
  parallel_for(faults.size(), [&](int64_t task) {
    for (int64_t row = task * kRowsPerTask; row < std::min(rows_, (task + 1) * kRowsPerTask); ++row) {
      for (int64_t i = row * width_; i < (row + 1) * width_; ++i) {
        const int64_t item = items_[i];
        if (item < 0) continue;
        const void* e = row_at(problem.catalog, item);
        float y = 0;
        dot(query + row * stride, &e, 1, problem.catalog.cols, &y);
        if (problem.bias) y += problem.bias[item];
        y /= problem.temperature;
        if (problem.log_q) y -= problem.log_q[item];
        if (!std::isfinite(y)) faults[task].note(row, item, y);
        logits_[i] = y;
      }
    }
  });
  for (const Fault& part : faults) fault_.note(part);
}

void Wanted::losses(const float* log_partition, float* out) const {
  for (int64_t row = 0; row < rows_; ++row) {
    const double z = log_partition[row];
    double loss = 0;
    if (std::isfinite(z) || std::isnan(z)) {
      for (int64_t k = 0; k < width_; ++k) {
        if (item(row, k) < 0) continue;
        loss += (k == 0 ? 1.0 : problem_.positive_weight) * softplus(z - logits_[row * width_ + k]);
      }
    }
    out[row] = static_cast<float>(loss);
  }
}

void Wanted::differentiate(const float* grad_losses, const float* log_partition) {
  weights_.assign(rows_, 0.0f);
  coefficients_.assign(items_.size(), 0.0f);
  for (int64_t row = 0; row < rows_; ++row) {
    const double z = log_partition[row];
    if (std::isinf(z)) continue;
    double weight = 0;
    for (int64_t k = 0; k < width_; ++k) {
      if (item(row, k) < 0) continue;
      const double g = (k == 0 ? 1.0 : problem_.positive_weight) * sigmoid(z - logits_[row * width_ + k]);
      weight += g;
      coefficients_[row * width_ + k] = static_cast<float>(-g * grad_losses[row]);
    }
    weights_[row] = static_cast<float>(weight * grad_losses[row]);
  }
}

std::vector<Pull> Wanted::pulls() const {
  std::vector<Pull> out;
  for (int64_t row = 0; row < rows_; ++row) {
    for (int64_t k = 0; k < width_; ++k) {
      if (coefficient(row, k) != 0.0f) out.push_back({item(row, k), row, coefficient(row, k)});
    }
  }
  std::stable_sort(out.begin(), out.end(), [](const Pull& a, const Pull& b) { return a.column < b.column; });
  return out;
}

void Wanted::add_to_query_gradient(int64_t row, float* out) const {
  const auto add = loss_kernels().weighted_sum[static_cast<int>(row_kind(problem_))];
  for (int64_t k = 0; k < width_; ++k) {
    const float weight = coefficient(row, k);
    if (weight == 0.0f) continue;
    const void* e = row_at(problem_.catalog, item(row, k));
    add(&weight, &e, 1, problem_.catalog.cols, out);
  }
}

}  // namespace alterrec
