// The CPU kernels of rank_slice and top_k for the schemas that Python defines, and the module alterrec_fast._C. Beside
// this file only binding_losses.cpp and binding_cuda.cpp know torch.library.
#include <ATen/ATen.h>
#include <Python.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/ranks.h"

namespace alterrec {
namespace {

using at::Tensor;

Matrix matrix(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type() == at::kBFloat16, t.size(0), t.size(1), t.stride(0)};
}

struct Exclude {
  Tensor values, offsets;

  Exclude(const Tensor& values, const Tensor& offsets, int64_t rows, int64_t items, bool check)
      : values(values.contiguous()), offsets(offsets.contiguous()) {
    check_vector("exclude offsets", offsets, rows + 1);
    TORCH_CHECK_TYPE(values.scalar_type() == at::kLong && offsets.scalar_type() == at::kLong,
                     "exclude must be int64, got ", values.scalar_type(), " and ", offsets.scalar_type());
    const int64_t *v = begin(), *o = bounds(), size = values.numel();
    TORCH_CHECK_VALUE(o[0] == 0 && o[rows] == size && std::is_sorted(o, o + rows + 1),
                      "exclude: offsets must rise from 0 to the ", size, " values, got ", offsets);
    for (int64_t row = 0; row < rows && check; ++row) {
      const int64_t* bad = std::find_if(v + o[row], v + o[row + 1], [&](int64_t id) { return id >= items; });
      TORCH_CHECK_VALUE(bad == v + o[row + 1], "exclude: row ", row, " holds ", *bad, ", expected an id below ", items);
    }
  }

  const int64_t* begin() const { return values.const_data_ptr<int64_t>(); }
  const int64_t* bounds() const { return offsets.const_data_ptr<int64_t>(); }
};

Tensor float_bias(const std::optional<Tensor>& bias, int64_t items) {
  if (!bias.has_value()) return {};
  check_vector("bias", *bias, items);
  return bias->to(at::kFloat).contiguous();
}

RankJob make_job(const Tensor& query, const Tensor& catalog, const Tensor& bias, int64_t first_item,
                 c10::string_view precision, bool check) {
  TORCH_CHECK_VALUE(precision == "fp32" || precision == "bf16", "precision must be fp32 or bf16, got ", precision);
  TORCH_CHECK_VALUE(catalog.dim() == 2, "catalog must be (V, d), got ", catalog.sizes());
  check_matrix("catalog", catalog, catalog.size(1));
  check_matrix("query", query, catalog.size(1));
  TORCH_CHECK_VALUE(catalog.size(0) <= std::numeric_limits<int32_t>::max() - kStreamTile,
                    "catalog must hold fewer than 2^31 items, got ", catalog.size(0));
  TORCH_CHECK_VALUE(first_item >= 0 && first_item <= catalog.size(0), "first_item must lie in [0, ", catalog.size(0),
                    "], got ", first_item);
  RankJob job{};
  job.query = matrix(query);
  job.catalog = matrix(catalog);
  job.arithmetic = choose_arithmetic(precision == "bf16");
  job.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  job.first_item = first_item;
  job.check = check;
  return job;
}

void check_rank(const char* name, int64_t first, int64_t last, int64_t items) {
  TORCH_CHECK_VALUE(0 <= first && first <= last && last <= items, name, ": expected ranks in [0, ", items, "], got ",
                    first, " to ", last);
}

void run(const RankJob& job, const Receive& receive) {
  const NotFinite bad = rank(job, receive);
  TORCH_CHECK_VALUE(bad.row < 0, "scores: row ", bad.row, " has a score of ", bad.score, ", expected a finite one");
}

std::tuple<Tensor, Tensor, Tensor> rank_slice(const Tensor& query, const Tensor& catalog, int64_t start, int64_t stop,
                                              int64_t top, const Tensor& exclude_values, const Tensor& exclude_offsets,
                                              const std::optional<Tensor>& bias, int64_t first_item,
                                              const std::optional<Tensor>& guess, c10::string_view precision,
                                              bool check) {
  const Tensor offsets = float_bias(bias, catalog.size(0));
  RankJob job = make_job(query, catalog, offsets, first_item, precision, check);
  const int64_t rows = query.size(0), items = catalog.size(0), size = stop - start;
  check_rank("start, stop", start, stop, items - first_item);
  check_rank("top", 0, top, items - first_item);
  const Exclude exclude(exclude_values, exclude_offsets, rows, items, check);
  // A guess is a hint that this engine leaves alone: a sample costs some hundredths of the product and is never out of
  // date, and a bracket that misses costs the whole product again.
  TORCH_CHECK_VALUE(!guess.has_value() || guess->sizes() == at::IntArrayRef({rows, 2}), "guess must be (", rows,
                    ", 2), got ", guess.has_value() ? guess->sizes() : at::IntArrayRef{});
  const int64_t words = (items + kWord - 1) / kWord;
  const bool as_bits = words * 8 <= 4 * size;
  Tensor members = as_bits ? at::empty({rows, words * 8}, query.options().dtype(at::kByte))
                           : at::empty({rows, size}, query.options().dtype(at::kInt));
  Tensor best = at::empty({rows, top}, query.options().dtype(at::kLong));
  Tensor thresholds = at::empty({rows, 2}, query.options().dtype(at::kFloat));
  if (items == first_item && as_bits) members.zero_();

  job.start = start;
  job.stop = stop;
  job.top = top;
  job.bits = as_bits && size > 0 ? reinterpret_cast<uint64_t*>(members.mutable_data_ptr<uint8_t>()) : nullptr;
  int32_t* ids = as_bits ? nullptr : members.mutable_data_ptr<int32_t>();
  int64_t* best_items = best.mutable_data_ptr<int64_t>();
  float* limits = thresholds.mutable_data_ptr<float>();
  run(job, [&](int64_t row, uint64_t* bits, const Settled& settled) {
    std::transform(settled.best.begin(), settled.best.end(), best_items + row * top,
                   [](uint64_t key) { return int64_t{from_key(key).id}; });
    limits[2 * row] = size > 0 ? settled.first.score : std::numeric_limits<float>::infinity();
    limits[2 * row + 1] = size > 0 ? settled.last.score : -std::numeric_limits<float>::infinity();
    if (bits == nullptr) return;
    for (int64_t i = exclude.bounds()[row]; i < exclude.bounds()[row + 1]; ++i) {
      const int64_t id = exclude.begin()[i];
      if (id >= 0 && id < items) bits[id / kWord] &= ~(uint64_t{1} << (id % kWord));
    }
    if (ids == nullptr) return;
    int32_t *out = ids + row * size, *end = out + size;
    for (int64_t w = 0; w < words; ++w) {
      for (uint64_t left = bits[w]; left != 0; left &= left - 1) {
        *out++ = static_cast<int32_t>(w * kWord + __builtin_ctzll(left));
      }
    }
    std::fill(out, end, -1);
  });
  return {members, best, thresholds};
}

std::tuple<Tensor, Tensor> top_k(const Tensor& query, const Tensor& catalog, int64_t k, const Tensor& exclude_values,
                                 const Tensor& exclude_offsets, const std::optional<Tensor>& bias, int64_t first_item,
                                 c10::string_view precision, bool check) {
  const Tensor offsets = float_bias(bias, catalog.size(0));
  RankJob job = make_job(query, catalog, offsets, first_item, precision, check);
  const int64_t rows = query.size(0), items = catalog.size(0);
  check_rank("k", 0, k, items - first_item);
  const Exclude exclude(exclude_values, exclude_offsets, rows, items, check);
  Tensor scores = at::empty({rows, k}, query.options().dtype(at::kFloat));
  Tensor best = at::empty({rows, k}, query.options().dtype(at::kLong));
  float* score = scores.mutable_data_ptr<float>();
  int64_t* item = best.mutable_data_ptr<int64_t>();

  job.top = k;
  job.extra = exclude.bounds();
  run(job, [&](int64_t row, uint64_t*, const Settled& settled) {
    std::vector<int64_t> out_of(exclude.begin() + exclude.bounds()[row], exclude.begin() + exclude.bounds()[row + 1]);
    std::sort(out_of.begin(), out_of.end());
    int64_t place = row * k;
    const int64_t end = place + k;
    for (auto key = settled.best.begin(); key != settled.best.end() && place < end; ++key) {
      const Cut cut = from_key(*key);
      if (std::binary_search(out_of.begin(), out_of.end(), int64_t{cut.id})) continue;
      score[place] = cut.score;
      item[place++] = cut.id;
    }
    std::fill(score + place, score + end, -std::numeric_limits<float>::infinity());
    std::fill(item + place, item + end, int64_t{-1});
  });
  return {scores, best};
}

TORCH_LIBRARY_IMPL(alterrec_fast, CPU, m) {
  m.impl("rank_slice", rank_slice);
  m.impl("top_k", top_k);
}

PyObject* isa_of_module(PyObject*, PyObject*) { return PyUnicode_FromString(isa_name(isa())); }

PyObject* counters_of_module(PyObject*, PyObject*) {
  const Counters c = counters();
  return Py_BuildValue("{s:L,s:L,s:L,s:L,s:L,s:L}", "rows", c.rows, "missed", c.missed, "overflow", c.overflow,
                       "bracket_ns", c.bracket_ns, "stream_ns", c.stream_ns, "settle_ns", c.settle_ns);
}

PyObject* set_trouble_of_module(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8(name);
  if (text == nullptr) return nullptr;
  const std::map<std::string, Trouble> known = {
      {"none", Trouble::kNone}, {"miss", Trouble::kMiss}, {"overflow", Trouble::kOverflow}};
  const auto found = known.find(text);
  if (found == known.end())
    return PyErr_Format(PyExc_ValueError, "trouble must be none, miss or overflow, got %s", text);
  set_trouble(found->second);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isa", isa_of_module, METH_NOARGS, "The instruction set in use: scalar, avx2, avx512, avx512_bf16 or amx."},
    {"counters", counters_of_module, METH_NOARGS,
     "Sessions ranked, missed and overflowed, and nanoseconds of each phase, since the process started."},
    {"set_trouble", set_trouble_of_module, METH_O, "For tests: forces 'miss', 'overflow' or, for 'none', neither."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "The native CPU engine.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace alterrec

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&alterrec::module); }
