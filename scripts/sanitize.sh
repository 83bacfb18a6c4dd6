#!/usr/bin/env bash
# Builds the C++ under sanitizers and runs what uses it:
#   the driver without Python under ThreadSanitizer, and under AddressSanitizer with leak detection;
#   the tests of the C++ with the extension under AddressSanitizer and UBSan.
# Usage: scripts/sanitize.sh [SHARD.tar]   (gcc; a tar of at least 32 images)
set -euo pipefail
cd "$(dirname "$0")/.."
shard="${1:-${BAGSSL_DATA:-../shared/data}/cifar10-test.tar}"
work="$PWD/build/sanitize"
mkdir -p "$work"

cxx="${CXX:-g++}"
flags=(-std=c++17 -O1 -g -fno-omit-frame-pointer -pthread -ffp-contract=off -fno-trapping-math -Icsrc)
libraries=()
if [[ "${BAGSSL_JPEG:-1}" != 0 ]]; then
  flags+=(-DBAGSSL_WITH_JPEG=1)
  libraries+=(-ljpeg)
fi
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

echo "== tests under AddressSanitizer and UBSan"
package="$work/package"
rm -rf "$package"
mkdir -p "$package"
cp -r bagssl_fast "$package/bagssl_fast"
cp -r kernels "$package/bagssl_fast/kernels"
find "$package" -name '*.so' -delete
BAGSSL_SANITIZE=address,undefined CXXFLAGS="-fno-sanitize-recover=undefined" \
  python setup.py -q build_ext --build-temp "$work/temp" --build-lib "$package"

# Python itself is not instrumented: the runtime has to be there before it, and Python's own
# allocations at exit are no leaks. Memory that stays flat cannot be measured under quarantine.
# PYTHONSAFEPATH keeps the working folder's own package out of the way (Python 3.11 and later).
preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONSAFEPATH=1 PYTHONPATH="$package" PYTHONMALLOC=malloc \
  python -m pytest -q -p no:cacheprovider \
  tests/test_loader.py tests/test_bad_files.py tests/test_sources.py tests/test_decoding.py \
  tests/test_pack.py tests/test_patch_views.py tests/test_view_params.py tests/test_device_views.py \
  tests/test_simd.py tests/test_winograd.py tests/test_add_relu.py tests/test_bag_pool.py tests/test_patch_embed.py \
  -k "not memory_is_flat and not command_line and not importing_without"
echo "sanitize: good"
