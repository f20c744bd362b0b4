#!/bin/sh
# hal_conformance.sh: builds libflagos.so alone (no torch) and runs the conformance suite against one chip, as it is and
# behind the validating interposer. Needs a C++ compiler, cmake, and a Python with pytest.
#   scripts/hal_conformance.sh [chip] [build folder]      PYTHON=path of the interpreter; default python3
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
chip=${1:-host}
build=${2:-"$root/build/hal"}
python=${PYTHON:-python3}
cmake -S "$root/accelerator" -B "$build" >/dev/null
cmake --build "$build" --parallel 2
for validate in 0 1; do
  echo "== chip $chip, FLAGOS_HAL_VALIDATE=$validate"
  FLAGOS_HAL_VALIDATE=$validate "$python" -m pytest -q -p no:cacheprovider "$root"/tests/hal/test_conform_*.py \
    --hal-chip "$chip" --hal-lib "$build/libflagos.so"
done
