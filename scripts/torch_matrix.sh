#!/bin/sh
# Builds this tree against other torch releases, each in its own environment and build folder, and runs the smoke tests
# (tests/integration/smoke.txt) there. A release may be CPU-only: libtorch_fl_cuda.so is then absent.
#   scripts/torch_matrix.sh                       # torch 2.13.0 with Python 3.11
#   scripts/torch_matrix.sh 2.12.1:3.12 2.13.0:3.11
set -e
cd "$(dirname "$0")/.."

# The Python of that version that can build extensions.
find_python() {
  for candidate in "python$1" $(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1"*/bin/python 2>/dev/null); do
    if PYTHON=$candidate sh scripts/find_python.sh -c "import sys; sys.exit(not sys.version.startswith('$1.'))" \
        2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "torch_matrix: no Python $1 with venv and Python.h here" >&2
  return 1
}

[ $# -gt 0 ] || set -- 2.13.0:3.11
for entry in "$@"; do
  torch=${entry%%:*}
  python=$(find_python "${entry#*:}")
  venv=build/venv-torch-$torch-py${entry#*:}
  echo "torch_matrix: torch $torch with $("$python" --version)"
  "$python" scripts/setup.py --venv "$venv" --torch "$torch" demo test
  "$venv/bin/python" -c "import torch, torch_fl; print('torch_matrix: built', torch.__version__, torch_fl.chip())"
  # shellcheck disable=SC2046
  OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q -n 2 --dist loadfile $(grep -v '^#' tests/integration/smoke.txt)
done
