// The module alterrec_fast._C; the ops are registered by the other binding files.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/isa.h"
#include "cpu/rank_slice.h"

namespace py = pybind11;

namespace alterrec {
namespace {

py::dict counters_as_dict() {
  const Counters c = counters();
  py::dict out;
  out["rows"] = c.rows;
  out["missed"] = c.missed;
  out["overflow"] = c.overflow;
  out["sample_ns"] = c.sample_ns;
  out["scan_ns"] = c.scan_ns;
  out["select_ns"] = c.select_ns;
  return out;
}

void force_fallback_by_name(const std::string& name) {
  if (name == "as needed") return force_fallback(Fallback::kAsNeeded);
  if (name == "missed") return force_fallback(Fallback::kMissed);
  if (name == "overflow") return force_fallback(Fallback::kOverflow);
  throw py::value_error("fallback must be 'as needed', 'missed' or 'overflow', got '" + name + "'");
}

}  // namespace
}  // namespace alterrec

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled engine.";
  m.def(
      "isa", [] { return alterrec::isa_name(alterrec::isa()); },
      "The instruction set in use: scalar, avx2, avx512, avx512_bf16 or amx.");
  m.def("counters", alterrec::counters_as_dict,
        "Sessions ranked, brackets missed, lists overflowed, and the nanoseconds of each phase, since the process "
        "started.");
  m.def("force_fallback", alterrec::force_fallback_by_name, py::arg("fallback"),
        "For tests: every row takes the fallback, as if its bracket had 'missed' its boundary or its list had an "
        "'overflow'; 'as needed' ends it.");
#ifdef ALTERREC_FAST_SANITIZED
  m.def(
      "read_beyond",
      [](std::uintptr_t address, std::size_t bytes) {
        return static_cast<int>(*reinterpret_cast<const volatile unsigned char*>(address + bytes));
      },
      "For the test of the sanitizer itself: reads the byte behind a block of memory.");
#endif
}
