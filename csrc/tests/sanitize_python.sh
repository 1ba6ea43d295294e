#!/bin/sh
# Builds the extension with AddressSanitizer, in a folder of its own, and runs the tests of the ops on it: a read or write
# outside a tensor ends the run. First a read that is known to be outside must be caught, or the run would prove nothing.
# Usage: sanitize_python.sh [pytest arguments]; PYTHON and BUILD name another interpreter and another folder.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
out=${BUILD:-$root/build/sanitize-python}
cxx=${CXX:-c++}
cd "$root"
mkdir -p "$out"
ALTERREC_FAST_SANITIZE=1 ALTERREC_FAST_NO_CUDA=1 "$python" setup.py -q build --build-base "$out" --build-lib "$out/lib" \
    >"$out/build.log" 2>&1 || { tail -40 "$out/build.log"; exit 1; }

# libstdc++ beside libasan, which otherwise misses the exceptions of libraries that are loaded later.
preload=$($cxx -print-file-name=libasan.so):$($cxx -print-file-name=libstdc++.so)
sanitized() {
    rm -f "$out"/report.*
    env LD_PRELOAD="$preload" ASAN_OPTIONS="detect_leaks=0:log_path=$out/report" PYTHONPATH="$out/lib:$root" \
        PYTHONSAFEPATH=1 PYTEST_ADDOPTS="--import-mode=importlib -p no:cacheprovider" OMP_NUM_THREADS=1 "$@"
}

where=$(sanitized "$python" -c 'from alterrec_fast import _C; print(_C.__file__)')
case $where in "$out"/lib/*) ;; *) echo "not the sanitized extension: $where" && exit 1 ;; esac
seeded='import torch; from alterrec_fast import _C; x = torch.zeros(10); _C.read_beyond(x.data_ptr(), 40)'
if sanitized "$python" -c "$seeded"; then echo "not caught: a read beyond a tensor"; exit 1; fi
grep -q "AddressSanitizer: heap-buffer-overflow" "$out"/report.* || { cat "$out"/report.*; exit 1; }
echo "caught: $(grep -hm1 "AddressSanitizer" "$out"/report.* | cut -c1-100)"

# Without the tests that measure memory, which the sanitizer holds back, and those that install or compile.
[ $# -gt 0 ] || set -- -n 2 -m "not shared and not root and not proof" \
    -k "not do_not_grow and not memory_promised and not an_install and not inductor" tests/ops
export ALTERREC_FAST_LAYOUT_CASES="${ALTERREC_FAST_LAYOUT_CASES:-300}"
sanitized "$python" -m pytest "$@" || { head -60 "$out"/report.* 2>/dev/null; exit 1; }
