#!/bin/bash
# Everything that needs a GPU, unattended: one log per stage in OUTDIR, results as JSON beside them, a table at the end.
#
#     PYTHONPATH=FOLDER scripts/gpu_suite.sh OUTDIR [stage...]
#
# FOLDER holds the built package (torch_fl with _C and the libraries); an installed torch_fl serves too. Stages: smoke
# tests dispatch qwen3 threads memory opdb hal tuned; without any, all of them in that order. STAGE_LIMIT (seconds,
# default 480) bounds each stage, SUITE_LIMIT all of them; a stage that fails or runs out of time never stops the next
# one.
# QWEN3_ARGUMENTS and OPDB_ARGUMENTS are passed on, for example QWEN3_ARGUMENTS="--parts decode --rounds 4".
set -u
if [ $# -lt 1 ]; then
  sed -n '2,10p' "$0"
  exit 2
fi
repo=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(smoke tests dispatch qwen3 threads memory opdb hal tuned)
limit=${STAGE_LIMIT:-480}
suite_end=$((SECONDS + ${SUITE_LIMIT:-36000}))
python=${PYTHON:-python3}
chip=${FLAGOS_ACCELERATOR:-cuda}
stock=${STOCK_DEVICE:-cuda} # what flagos is compared with; cpu tries the suite on a machine without a GPU

# Python sources of this tree and the built libraries, side by side: pytest puts its root before PYTHONPATH.
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
package=$("$python" -c '
import glob, importlib.util, os, sys
folders = [os.path.join(p, "torch_fl") for p in sys.path]
spec = importlib.util.find_spec("torch_fl")
folders += list(spec.submodule_search_locations) if spec else []
print(next((f for f in folders if glob.glob(os.path.join(f, "_C*.so"))), ""))')
if [ -z "$package" ]; then
  echo "gpu_suite: no built torch_fl on PYTHONPATH (_C*.so is missing); build it and set PYTHONPATH to the folder above"
  exit 2
fi
for part in torch_fl tests benchmarks scripts accelerator include csrc emulators docs pytest.ini; do
  [ -e "$repo/$part" ] && cp -r "$repo/$part" "$tree/"
done
cp "$package"/*.so "$package/_build.py" "$tree/torch_fl/" || exit 2
cd "$tree" || exit 2
export PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 FLAGOS_ACCELERATOR="$chip"

declare -A verdict
stage() { # name command...
  local name=$1 started=$SECONDS bound=$limit left=$((suite_end - SECONDS))
  shift
  [ $left -lt $bound ] && bound=$left
  if [ $bound -lt 10 ]; then
    verdict[$name]="not run: the suite's time is up"
    return
  fi
  echo "== $name (at most $bound s)"
  timeout -k 10 "$bound" "$@" >"$out/$name.log" 2>&1
  local code=$?
  case $code in
  0) verdict[$name]="ok" ;;
  124 | 137) verdict[$name]="out of time" ;;
  *) verdict[$name]="exit code $code" ;;
  esac
  verdict[$name]+=", $((SECONDS - started)) s"
  tail -n 25 "$out/$name.log"
}

# What a benchmark may take: a little less than its stage, so that it ends by itself.
inner=$((limit - limit / 8))
for name in "${stages[@]}"; do
  case $name in
  smoke)
    stage smoke bash -c "nvidia-smi; '$python' -m torch_fl doctor && '$python' benchmarks/import_time.py --out '$out'"
    ;;
  tests)
    # The sweeps have stages of their own. Workers share the GPU; without pytest-xdist one process does it all.
    spread=()
    "$python" -c 'import xdist' 2>/dev/null && spread=(-n 8 --dist loadfile)
    stage tests "$python" -m pytest tests/integration -q --maxfail=100 -m "not slow" -p no:cacheprovider \
      "${spread[@]}" --timeout 120 --ignore tests/integration/ops/test_opdb.py \
      --ignore tests/integration/test_moduledb.py
    ;;
  dispatch)
    stage dispatch "$python" benchmarks/dispatch.py --pair "$stock,flagos" --json "$out/dispatch.json"
    ;;
  qwen3)
    size=full
    [ "$stock" = cpu ] && size=small
    stage qwen3 "$python" benchmarks/qwen3.py --pair "$stock,flagos" --size $size --out "$out" --limit $inner \
      ${QWEN3_ARGUMENTS:-}
    ;;
  threads)
    stage threads "$python" benchmarks/threads.py --pair "$stock,flagos" --out "$out" --limit $inner
    ;;
  memory)
    [ "$stock" = cpu ] && pair=flagos,flagos || pair=$stock,flagos
    stage memory "$python" benchmarks/memory.py --pair "$pair" --out "$out" --limit $inner
    ;;
  opdb)
    stage opdb "$python" tests/integration/ops/against_stock.py --stock "$stock" --limit $inner \
      --json "$out/opdb_$stock.json" ${OPDB_ARGUMENTS:-}
    ;;
  hal)
    stage hal "$python" -m pytest tests/hal -q --hal-chip "$chip" -p no:cacheprovider --timeout 120
    ;;
  tuned)
    size=full
    [ "$stock" = cpu ] && size=small
    stage tuned "$python" benchmarks/tuned.py --size $size --out "$out" --limit $inner
    ;;
  *)
    verdict[$name]="no such stage"
    ;;
  esac
done

echo
failed=0
{
  for name in "${stages[@]}"; do
    printf '%-10s %s\n' "$name" "${verdict[$name]}"
    [[ ${verdict[$name]} == ok,* ]] || failed=1
  done
} | tee "$out/summary.txt"
for name in "${stages[@]}"; do
  [[ ${verdict[$name]} == ok,* ]] || failed=1
done
exit $failed
