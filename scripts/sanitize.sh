#!/usr/bin/env bash
# Builds the C++ under sanitizers and runs what uses it:
#   the driver without Python under ThreadSanitizer, and under AddressSanitizer with leak detection;
#   the tests of the C++ with the extension under AddressSanitizer and UBSan, and those whose
#   threads share something under ThreadSanitizer.
# Usage: scripts/sanitize.sh [SHARD.tar]   (gcc; a tar of at least 32 images; PYTHON=python)
#        scripts/sanitize.sh fuzz [ARGUMENTS of fuzz/run.py]   under AddressSanitizer and UBSan
set -euo pipefail
cd "$(dirname "$0")/.."
work="$PWD/build/sanitize"
mkdir -p "$work"

cxx="${CXX:-g++}"
python="${PYTHON:-python}"
flags=(-std=c++17 -O1 -g -fno-omit-frame-pointer -pthread -ffp-contract=off -fno-trapping-math -Icsrc)
libraries=()
if [[ "${BAGSSL_JPEG:-1}" != 0 ]]; then
  flags+=(-DBAGSSL_WITH_JPEG=1)
  libraries+=(-ljpeg)
fi

# A copy of the package whose extension is built under a sanitizer.
build() {
  package="$work/package-${1%%,*}"
  rm -rf "$package"
  mkdir -p "$package"
  cp -r bagssl_fast "$package/bagssl_fast"
  cp -r kernels "$package/bagssl_fast/kernels"
  find "$package" -name '*.so' -delete
  BAGSSL_SANITIZE="$1" CXXFLAGS="-fno-sanitize-recover=undefined" \
    "$python" setup.py -q build_ext --build-temp "$work/temp-${1%%,*}" --build-lib "$package"
}

# Python itself is not instrumented: the runtime has to be there before it, and Python's own
# allocations at exit are no leaks. PYTHONSAFEPATH keeps the working folder's own package out of the
# way (Python 3.11 and later).
under_address() {
  build address,undefined
  preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
  LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
    UBSAN_OPTIONS=print_stacktrace=1 PYTHONSAFEPATH=1 PYTHONPATH="$package:fuzz" PYTHONMALLOC=malloc \
    "$python" "$@"
}

if [[ "${1:-}" == fuzz ]]; then
  under_address fuzz/run.py "${@:2}"
  exit
fi

shard="${1:-${BAGSSL_DATA:-../shared/data}/cifar10-test.tar}"
sources=()
for source in csrc/*.cpp; do
  [[ "$source" == *bindings* ]] || sources+=("$source")
done

for sanitizer in thread address,undefined; do
  driver="$work/driver-${sanitizer%%,*}"
  echo "== driver under -fsanitize=$sanitizer"
  "$cxx" "${flags[@]}" "-fsanitize=$sanitizer" -fno-sanitize-recover=all \
    scripts/sanitize_driver.cpp "${sources[@]}" "${libraries[@]}" -o "$driver"
  TSAN_OPTIONS=halt_on_error=1 ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 \
    "$driver" "$shard"
done

# All test files that reach the C++; tests/test_sanitize.py knows which those are.
loader_tests=(
  tests/test_loader.py tests/test_loader_contract.py tests/test_loader_threads.py
  tests/test_function_source.py
)
op_tests=(
  tests/test_add_relu.py tests/test_bag_pool.py tests/test_conv_bf16.py tests/test_conv_bn_relu.py
  tests/test_patch_embed.py tests/test_patch_views.py tests/test_relu_mean.py
  tests/test_winograd.py
)
other_tests=(
  tests/test_bad_files.py tests/test_changing_files.py tests/test_damaged_sets.py
  tests/test_decoding.py tests/test_hostile_files.py
  tests/test_device_views.py tests/test_fused.py tests/test_integrations_data.py
  tests/test_limits.py tests/test_pack.py tests/test_simd.py tests/test_sources.py
  tests/test_view_params.py
)

# Memory that stays flat cannot be measured under quarantine, nor the address space limited.
measured="memory_is_flat or memory_of_large or cannot_be_created or more_shards_than"
elsewhere="command_line or importing_without"

echo "== tests under AddressSanitizer and UBSan"
under_address -m pytest -q -p no:cacheprovider \
  "${loader_tests[@]}" "${op_tests[@]}" "${other_tests[@]}" -k "not ($measured or $elsewhere)"

# After fork() ThreadSanitizer knows nothing of the child's threads.
echo "== tests under ThreadSanitizer"
build thread
preload="$("$cxx" -print-file-name=libtsan.so) $("$cxx" -print-file-name=libstdc++.so)"
LD_PRELOAD="$preload" TSAN_OPTIONS="halt_on_error=0 exitcode=66 report_bugs=1 die_after_fork=0" \
  PYTHONSAFEPATH=1 PYTHONPATH="$package" \
  "$python" -m pytest -q -p no:cacheprovider "${loader_tests[@]}" "${op_tests[@]}" \
  -k "not ($measured or $elsewhere or fork or workers_of_a_data_loader or subprocess)"
echo "sanitize: good, all C++ test files, on commit $(git rev-parse --short HEAD)"
