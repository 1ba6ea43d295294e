#!/bin/sh
# Runs the CUDA kernels on the CPU (tests/cuda_on_cpu.h): their numbers, under AddressSanitizer and UBSan on fibers and
# under ThreadSanitizer on threads. Two seeded bugs must be caught, or the checks would prove nothing. Needs a C++ compiler
# and the headers of the CUDA toolkit. Usage: cuda_on_cpu.sh [build folder]
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-$root/build/cuda_on_cpu}
cuda=${CUDA_HOME:-/usr/local/cuda}
rm -rf "$out"
mkdir -p "$out/seeded/cuda"

# build NAME CSRC FLAGS...: the test binary $out/NAME from the kernels in CSRC/cuda
build() {
    name=$1 csrc=$2
    shift 2
    ${CXX:-c++} -std=c++20 -g -fno-omit-frame-pointer -pthread -Wall -Wextra -Wno-unknown-pragmas "$@" -I"$csrc" -I"$root/csrc" \
        -isystem "$cuda/include" -x c++ "$root"/csrc/tests/cuda_*_test.cpp "$csrc"/cuda/*.cu -o "$out/$name"
}

# seed FILE LINE BUG: a copy of the kernels in which BUG replaces the only line that reads LINE
seed() {
    cp "$root"/csrc/cuda/* "$out/seeded/cuda/"
    [ "$(grep -cxF "$2" "$out/seeded/cuda/$1")" = 1 ] || { echo "the seeded bug's line is gone: $2"; exit 1; }
    awk -v line="$2" -v bug="$3" '{ print $0 == line ? bug : $0 }' "$root/csrc/cuda/$1" >"$out/seeded/cuda/$1"
}

# caught NAME PATTERN: the binary must fail, and say so
caught() {
    if "$out/$1" short >"$out/$1.log" 2>&1; then echo "not caught: $1"; exit 1; fi
    grep -q "$2" "$out/$1.log" || { echo "$1 failed, but not by $2:"; tail -20 "$out/$1.log"; exit 1; }
    echo "caught: $1, $(grep -m1 "$2" "$out/$1.log" | cut -c1-100)"
}

threads="-DCUDA_ON_CPU_THREADS -O1 -fsanitize=thread"
memory="-O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
# shellcheck disable=SC2086
build memory "$root/csrc" $memory
"$out/memory"
# shellcheck disable=SC2086
build races "$root/csrc" $threads
TSAN_OPTIONS=halt_on_error=1 "$out/races" short

seed sampled_softmax_backward.cu "      __syncthreads();  // the tile is there" ""
# shellcheck disable=SC2086
build missing-sync "$out/seeded" $threads
caught missing-sync "ThreadSanitizer: data race"
seed gather.cuh "    if (aligned && first + kPiece <= width) {" "    if (aligned) {"
# shellcheck disable=SC2086
build out-of-bounds "$out/seeded" $memory
caught out-of-bounds "AddressSanitizer: heap-buffer-overflow"
