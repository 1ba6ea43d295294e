#include "cpu/loss.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "cpu/blas.h"
#include "cpu/kernels.h"

namespace alterrec {
namespace {

constexpr int64_t kRowsPerTask = 64;

// A row of the catalog, in memory or, where it has a norm, in `normed`.
const void* row_of(const Matrix& catalog, int64_t id, Buffer<float>& normed) {
  return catalog.norm ? normalised(catalog, id, 1, normed).data : catalog.row(id);
}

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
  const auto of = [](Format format, Row f32, Row bf16, Row f16) {
    return format == Format::kF32 ? f32 : format == Format::kBF16 ? bf16 : f16;
  };
  const Row f32 = of(problem.precision, Row::kF32, Row::kF32ToBF16, Row::kF32ToF16);
  return problem.catalog.norm ? f32 : of(problem.catalog.format, f32, Row::kBF16, Row::kF16);
}

void write_row(const float* values, int64_t row, int64_t width, Format format, void* out) {
  if (format == Format::kF32) {
    std::copy_n(values, width, static_cast<float*>(out) + row * width);
  } else {
    kernels().narrow(format, values, width, static_cast<uint16_t*>(out) + row * width);
  }
}

Positives::Positives(const LossProblem& problem, const float* query, int64_t stride)
    : problem_(problem), rows_(problem.query.rows), width_(1 + problem.num_positives), values_(rows_ * width_) {
  const auto check_item = [&](const char* name, int64_t row, int64_t id, int64_t none) {
    check_id(name, row, id, none, problem.first_item, problem.catalog.rows);
    if (!problem.check || id == none || ignored(row) || !problem.masked(id)) return;
    std::ostringstream message;
    message << name << ": row " << row << " holds " << id << ", whose bias is -inf";
    throw ValueError(message.str());
  };
  for (int64_t row = 0; row < rows_; ++row) {
    check_item("target", row, problem.target[row], problem.ignore_index);
    for (int64_t k = 0; k < problem.num_positives; ++k) {
      check_item("positives", row, problem.positives.at(row * problem.num_positives + k), -1);
    }
  }
  std::vector<Fault> faults((rows_ + kRowsPerTask - 1) / kRowsPerTask);
  const auto dot = loss_kernels().dot_rows[static_cast<int>(row_kind(problem))];
  parallel_for(faults.size(), [&](int64_t task) {
    Buffer<float> normed;
    for (int64_t row = task * kRowsPerTask; row < std::min(rows_, (task + 1) * kRowsPerTask); ++row) {
      for (int64_t k = 0; k < width_; ++k) {
        const int64_t id = item(row, k);
        if (id < 0) continue;
        const void* e = row_of(problem.catalog, id, normed);
        float y = 0;
        dot(query + row * stride, &e, 1, problem.catalog.cols, &y);
        if (problem.bias) y += problem.bias[id];
        y /= problem.temperature;
        if (problem.log_q) y -= problem.log_q[id];
        if (!std::isfinite(y)) faults[task].note(row, id, y);
        values_[row * width_ + k] = y;
      }
    }
  });
  for (const Fault& part : faults) fault_.note(part);
}

void Positives::losses(const float* lse, float* out) const {
  for (int64_t row = 0; row < rows_; ++row) {
    const double z = lse[row];
    double loss = 0;
    if (std::isfinite(z) || std::isnan(z)) {
      for (int64_t k = 0; k < width_; ++k) {
        if (item(row, k) < 0) continue;
        loss += (k == 0 ? 1.0 : problem_.positive_weight) * softplus(z - values_[row * width_ + k]);
      }
    }
    out[row] = static_cast<float>(loss);
  }
}

void Positives::differentiate(const float* grad_losses, const float* lse) {
  weights_.assign(rows_, 0.0f);
  for (int64_t row = 0; row < rows_; ++row) {
    const double z = lse[row];
    double weight = 0;
    for (int64_t k = 0; k < width_; ++k) {
      float& value = values_[row * width_ + k];
      if (std::isinf(z) || item(row, k) < 0) {
        value = 0.0f;
        continue;
      }
      const double g = (k == 0 ? 1.0 : problem_.positive_weight) * sigmoid(z - value);
      weight += g;
      value = static_cast<float>(-g * grad_losses[row]);
    }
    if (weight != 0) weights_[row] = static_cast<float>(weight * grad_losses[row]);
  }
}

void Positives::add_to_query_gradient(int64_t row, float* out) const {
  const auto add = loss_kernels().weighted_sum[static_cast<int>(row_kind(problem_))];
  Buffer<float> normed;
  for (int64_t k = 0; k < width_; ++k) {
    const float weight = dlogit(row, k);
    if (weight == 0.0f) continue;
    const void* e = row_of(problem_.catalog, item(row, k), normed);
    add(&weight, &e, 1, problem_.catalog.cols, out);
  }
}

}  // namespace alterrec
