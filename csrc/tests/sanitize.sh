#!/bin/sh
# Builds the kernels' own test binary with AddressSanitizer and UBSan, then with ThreadSanitizer, and runs each with every
# instruction set that this CPU has. No torch in it: tests/plain_blas.cpp stands in. Usage: sanitize.sh [build folder]
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-$root/build/sanitize}
rm -rf "$out"
sources=$(ls "$root"/csrc/cpu/*.cpp | grep -v torch_blas)
flags="-std=c++20 -O1 -g -fno-omit-frame-pointer -Wno-psabi -pthread -I$root/csrc"
for name in address,undefined thread; do
    folder=$out/$(echo $name | tr , -)
    mkdir -p "$folder"
    for test in "$root"/csrc/tests/rank_test.cpp "$root"/csrc/tests/loss_test.cpp; do  # cuda_on_cpu.sh has the others
        binary=$folder/$(basename "$test" .cpp)
        objects=""
        for source in $sources "$root/csrc/tests/plain_blas.cpp" "$test"; do
            object=$folder/$(basename "$source" .cpp).o
            # shellcheck disable=SC2086
            [ "$object" -nt "$source" ] || ${CXX:-c++} $flags -fsanitize=$name -fno-sanitize-recover=all -c "$source" -o "$object"
            objects="$objects $object"
        done
        # shellcheck disable=SC2086
        ${CXX:-c++} $flags -fsanitize=$name $objects -o "$binary"
        for isa in scalar avx2 avx512 avx512_bf16 amx; do
            echo "$name, $isa"
            ALTERREC_FAST_ISA=$isa "$binary"
        done
    done
done
