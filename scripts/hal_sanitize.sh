#!/bin/sh
# hal_sanitize.sh: builds libflagos.so and the stress program of tests/hal under AddressSanitizer and ThreadSanitizer
# and runs them, with and without random delays and the validating interposer. Any finding fails the script.
#   scripts/hal_sanitize.sh [build folder]     ROUNDS=n sets the rounds of each thread (default 150)
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-"$root/build/hal_sanitize"}
rounds=${ROUNDS:-150}
for sanitizer in address thread; do
  echo "== $sanitizer: building"
  cmake -S "$root/accelerator" -B "$build/$sanitizer" -DFLAGOS_SANITIZE=$sanitizer -DFLAGOS_STRESS=ON >/dev/null
  cmake --build "$build/$sanitizer" --parallel 2 >"$build/$sanitizer/build.log" 2>&1 || {
    cat "$build/$sanitizer/build.log"
    exit 1
  }
  for validate in 0 1; do
    for seed in 0 7; do
      echo "== $sanitizer: FLAGOS_HAL_VALIDATE=$validate, delays seeded with $seed"
      # detect_leaks: LeakSanitizer needs ptrace, which containers often forbid; the program counts its own blocks.
      FLAGOS_HAL_VALIDATE=$validate \
        ASAN_OPTIONS=detect_leaks=${DETECT_LEAKS:-1}:handle_segv=0:abort_on_error=0 \
        TSAN_OPTIONS=halt_on_error=0:exitcode=66 \
        "$build/$sanitizer/flagos_stress" host "$rounds" "$seed"
    done
  done
done
echo "== clean"
