#!/bin/sh
# Runs its arguments with the best Python on this machine: 3.12, else the newest other one from 3.10 on. A candidate
# must be able to make a virtual environment and have the header Python.h, since extensions are compiled for it.
# PYTHON=/path/to/python overrides the search.
fits='import sys, os, sysconfig, venv, ensurepip
sys.exit(not (sys.version_info >= (3, 10) and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))))'

candidates() {
  [ -n "$PYTHON" ] && { echo "$PYTHON"; return; }
  echo python3.12
  ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python 2>/dev/null
  echo python3.13; echo python3.11; echo python3.10
  ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[0134]*/bin/python 2>/dev/null | sort -r
  echo python3
}

for candidate in $(candidates); do
  if "$candidate" -c "$fits" >/dev/null 2>&1; then
    exec "$candidate" "$@"
  fi
done
if [ -n "$PYTHON" ]; then
  echo "setup: PYTHON=$PYTHON does not fit: needs Python >= 3.10 with venv and Python.h (python3-dev)" >&2
else
  echo "setup: no fitting Python: needs >= 3.10 (best 3.12) with venv and Python.h." \
       "On Debian or Ubuntu: apt-get install python3 python3-venv python3-dev" >&2
fi
exit 1
