// What both forms of the losses share: the problem, and its targets and positives.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "cpu/loss_kernels.h"
#include "cpu/tile.h"

namespace alterrec {

// Item ids in either width, side by side.
struct Ids {
  const int32_t* narrow = nullptr;  // one of the two, or none
  const int64_t* wide = nullptr;

  int64_t at(int64_t i) const { return narrow ? narrow[i] : wide[i]; }
};

// Whether the item is never a negative: its bias is -inf.
inline bool is_masked(const float* bias, int64_t item) {
  return bias && bias[item] < std::numeric_limits<float>::lowest();
}

// With y_i = (q . e_i + bias_i) / temperature - log_q_i and Z the log-sum-exp of y over a row's negatives, the row's
// loss is softplus(Z - y_t) + positive_weight * sum_k softplus(Z - y_k); zero without negatives or target.
struct LossProblem {
  Matrix query;           // (B, d); zero in rows whose target is ignored
  Matrix catalog;         // (V, d)
  Format precision;       // what values are rounded to before they are multiplied
  const int64_t* target;  // (B,)
  Ids positives;          // (B, P), -1 for none
  int64_t num_positives;  // P
  const float* bias;      // (V,) or null; -inf: the item is no negative
  const float* log_q;     // (V,) or null
  double positive_weight;
  float temperature;
  int64_t first_item;
  int64_t ignore_index;
  bool check;  // whether a score that is not finite raises

  bool masked(int64_t item) const { return is_masked(bias, item); }
};

// An argument with a wrong value; the message holds row and value.
struct ValueError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Raises ValueError where an id is neither `none` nor in [first, stop).
void check_id(const char* name, int64_t row, int64_t id, int64_t none, int64_t first, int64_t stop);

// The first score, by row and then by column, that is not finite.
struct Fault {
  int64_t row = -1, column = 0;
  float score = 0;

  void note(int64_t at_row, int64_t at_column, float value) {
    if (row < 0 || at_row < row || (at_row == row && at_column < column)) *this = {at_row, at_column, value};
  }
  void note(const Fault& other) {
    if (other.row >= 0) note(other.row, other.column, other.score);
  }
  void raise() const;  // ValueError, where there was one
};

// Where gradients go; null for those that nobody needs. Rows are dense, in the dtype of the input.
struct Gradients {
  void* query;    // (B, d)
  void* catalog;  // (rows, d)
  float* bias;    // one for each row of the catalog's gradient
  Format query_format, catalog_format;
};

// How rows of the catalog are read, one by one.
Row row_kind(const LossProblem& problem);
// Writes float32 values as row `row` of a dense matrix.
void write_row(const float* values, int64_t row, int64_t width, Format format, void* out);

// Targets and positives: 1 + P items a row that meet the same negatives; place 0 is the target.
class Positives {
 public:
  // Checks the ids. `query` holds the rows as float32, `stride` apart.
  Positives(const LossProblem& problem, const float* query, int64_t stride);

  int64_t width() const { return width_; }
  bool ignored(int64_t row) const { return problem_.target[row] == problem_.ignore_index; }
  // -1 for none, in all places of a row whose target is ignored.
  int64_t item(int64_t row, int64_t place) const {
    if (ignored(row)) return -1;
    return place == 0 ? problem_.target[row] : problem_.positives.at(row * problem_.num_positives + place - 1);
  }
  const Fault& fault() const { return fault_; }  // among the logits of these items

  void losses(const float* lse, float* out) const;

  // Computes the weights, and in place of these items' logits their gradients: d loss / d y times the gradient of the
  // row's loss.
  void differentiate(const float* grad_losses, const float* lse);
  // The gradient of a negative's logit, over exp(y - Z); zero for rows without loss.
  const float* weights() const { return weights_.data(); }
  float dlogit(int64_t row, int64_t place) const { return values_[row * width_ + place]; }
  // out += sum over the row's items of dlogit * e_item.
  void add_to_query_gradient(int64_t row, float* out) const;

 private:
  const LossProblem& problem_;
  const int64_t rows_, width_;
  Fault fault_;
  std::vector<float> weights_;  // (B,)
  std::vector<float> values_;   // (B, 1 + P): the logits, and after differentiate() their gradients
};

}  // namespace alterrec
