#!/bin/bash
# Everything that needs a GPU, unattended: results as JSON in OUTDIR, to be copied to benchmarks/results, a log per
# stage and a table at the end.
#
#     PYTHONPATH=FOLDER scripts/gpu_suite.sh OUTDIR [stage...]
#
# FOLDER holds the built package (torch_fl with _C and the libraries); an installed torch_fl serves too. Stages:
#     smoke dispatch threads memory qwen3     time something and run alone; `timing` is all of them
#     tests hal opdb                          may run side by side: tests+hal
#     judge plans plan_time opdb_flaggems tuned   need FlagGems; `flaggems` is all of them, in that order: the judge's
#                                             verdicts make the conf file of the others, its compiled kernels serve them
# Without any: timing tests+hal opdb. `name:SECONDS` bounds a stage; SUITE_LIMIT bounds all together. A stage that fails
# or is cut off never stops the next one, and leaves its JSON with what it has. JUDGE_WORK: the judge's folder, which
# may hold outcomes of an earlier call, wherever that ran (default: in TMPDIR). JOBS: processes of stages that use many
# (default: the cores less two, shared by what runs side by side). TESTS and HAL_TESTS: what tests and hal run.
#
# A GPU for half an hour, in calls of ten minutes, with 16 cores:
#     SUITE_LIMIT=570 scripts/gpu_suite.sh OUT timing          # dispatch, threads, memory, import, Qwen3
#     SUITE_LIMIT=570 scripts/gpu_suite.sh OUT tests+hal
#     SUITE_LIMIT=570 scripts/gpu_suite.sh OUT opdb
# and FlagGems in another half hour: SUITE_LIMIT=570 ... judge plans plan_time opdb_flaggems, then tuned
# on a tree that has the verdicts and the conf file that came back.
# Where few files come back: scripts/gpu_suite.sh /tmp/out ...; tar czf "$OUT/results.tgz" -C /tmp/out .
# On a machine without a GPU, to try the suite itself: FLAGOS_ACCELERATOR=host STOCK_DEVICE=cpu, or on the null CUDA
#     NULL_CUDA_ARCH=80 SIZE=small python -m tests.common.null_cuda scripts/gpu_suite.sh OUTDIR
set -u
if [ $# -lt 1 ]; then
  sed -n '2,/^set -u/{/^set -u/!p}' "$0"
  exit 2
fi
repo=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
work=$(realpath -m "${JUDGE_WORK:-${TMPDIR:-/tmp}/torch_fl_judge}") # outcomes and compiled kernels
shift
groups=()
for group in "${@:-timing tests+hal opdb}"; do
  for part in $group; do
    case $part in
    timing) groups+=(smoke dispatch threads memory qwen3) ;;
    flaggems) groups+=(judge plans plan_time opdb_flaggems tuned) ;;
    *) groups+=("$part") ;;
    esac
  done
done
suite_end=$((SECONDS + ${SUITE_LIMIT:-36000}))
python=${PYTHON:-python3}
chip=${FLAGOS_ACCELERATOR:-cuda}
stock=${STOCK_DEVICE:-cuda} # what flagos is compared with; cpu tries the suite on a machine without a GPU
pair=$stock,flagos
size=${SIZE:-$([ "$stock" = cpu ] && echo small || echo full)}
cores=$(nproc)

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
for part in torch_fl tests benchmarks scripts accelerator include csrc cmake emulators docs pytest.ini; do
  [ -e "$repo/$part" ] && cp -r "$repo/$part" "$tree/"
done
cp "$package"/*.so "$package/_build.py" "$tree/torch_fl/" || exit 2
cd "$tree" || exit 2
# As if installed there, with the entry point that `import torch` follows: processes that set a PYTHONPATH of their own
# find it too, and whatever this interpreter finds.
"$python" -m venv --without-pip "$tree/venv" || exit 2
"$python" - "$tree" "$repo/pyproject.toml" <<'END' || exit 2
import pathlib, re, sys
tree, project = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).read_text()
site = next(tree.glob("venv/lib/python*/site-packages"))
(site / "tree.pth").write_text("\n".join([str(tree), *filter(None, sys.path)]) + "\n")
version, entry = (re.search(rf'^{name} = "(.*)"', project, re.M)[1] for name in ("version", "torch_fl"))
facts = site / f"torch_fl-{version}.dist-info"
facts.mkdir()
(facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_fl\nVersion: {version}\n")
(facts / "entry_points.txt").write_text(f"[torch.backends]\ntorch_fl = {entry}\n")
END
python="$tree/venv/bin/python3"
"$python" -m compileall -q "$tree/torch_fl" # as an installation does
unset PYTHONPATH
export PYTHONUNBUFFERED=1 FLAGOS_ACCELERATOR="$chip"

declare -A seconds=([smoke]=60 [dispatch]=90 [threads]=100 [memory]=60 [qwen3]=270
  [tests]=480 [hal]=120 [opdb]=540 [judge]=270 [plans]=120 [plan_time]=40 [opdb_flaggems]=110 [tuned]=300)
export FLAGGEMS_CACHE_DIR=${FLAGGEMS_CACHE_DIR:-$work/cache}

# stage NAME LIMIT JOBS: runs it; what a stage may take by itself (inner) is less, so that it ends in order.
stage() {
  local limit=$2 jobs=$3 inner=$(($2 - 5 - $2 / 20)) run=()
  export OMP_NUM_THREADS=1
  case $1 in # these compare the chip's own kernels with stock
  smoke | dispatch | threads | memory | qwen3 | tests | opdb) export FLAGOS_DISABLE_FLAGGEMS_PY=1 ;;
  esac
  case $1 in
  smoke)
    run=(bash -c "nvidia-smi; '$python' -m torch_fl doctor
      '$python' benchmarks/import_time.py --repeat 5 --limit $((inner / 2)) --out '$out'")
    ;;
  dispatch) run=("$python" benchmarks/dispatch.py --pair "$pair" --limit $inner --out "$out") ;;
  threads) run=("$python" benchmarks/threads.py --pair "$pair" --limit $inner --out "$out" ${THREADS_ARGUMENTS:-}) ;;
  memory)
    local of=$pair
    [ "$stock" = cpu ] && of=flagos,flagos
    run=("$python" benchmarks/memory.py --pair "$of" --limit $inner --out "$out" ${MEMORY_ARGUMENTS:-})
    ;;
  qwen3)
    run=("$python" benchmarks/qwen3.py --pair "$pair" --size "$size" --limit $inner --out "$out" ${QWEN3_ARGUMENTS:-})
    ;;
  tests)
    # The sweeps have stages of their own. Without pytest-xdist one process does it all.
    local spread=()
    "$python" -c 'import xdist' 2>/dev/null && spread=(-n "$jobs" --dist loadfile)
    run=("$python" -m pytest ${TESTS:-tests/integration} -q -m "not slow" -p no:cacheprovider "${spread[@]}"
      --timeout 240 --ignore tests/integration/ops/test_opdb.py --ignore tests/integration/test_moduledb.py
      --results "$out/tests_$chip.json")
    ;;
  hal)
    run=("$python" -m pytest ${HAL_TESTS:-tests/hal} -q --hal-chip "$chip" -p no:cacheprovider --timeout 120
      --results "$out/hal_$chip.json")
    ;;
  opdb)
    run=("$python" tests/integration/ops/against_stock.py --stock "$stock" --limit $inner --jobs "$jobs"
      --json "$out/opdb_$stock.json" ${OPDB_ARGUMENTS:-})
    ;;
  judge) # the verdicts and the conf file that they make go into the tree, where the later stages find them,
    run=(bash -c "trap : TERM
      '$python' scripts/judge_flaggems.py --jobs $jobs --work '$work' ${JUDGE_ARGUMENTS:-} --budget $inner
      code=\$?; '$python' scripts/flaggems_conf.py
      cp torch_fl/flaggems/verdicts_*.json torch_fl/backends_flagos_py.conf '$out'; exit \$code")
    ;;
  plans)
    run=("$python" benchmarks/plan_sweep.py --work "$work" --json "$out/plans_$chip.json" --jobs "$jobs"
      ${PLANS_ARGUMENTS:-} --seconds $inner)
    ;;
  plan_time) run=("$python" benchmarks/plans.py --json "$out/plans_time_$chip.json") ;;
  opdb_flaggems)
    run=("$python" tests/integration/ops/against_native.py --jobs "$jobs" --json "$out/opdb_flagos_py.json"
      ${FLAGGEMS_OPDB_ARGUMENTS:-} --limit $inner)
    ;;
  tuned) run=("$python" benchmarks/tuned.py --size "$size" --out "$out" --limit $inner) ;;
  *)
    echo "no such stage" >"$out/$1.log"
    return 2
    ;;
  esac
  timeout -k 5 "$limit" "${run[@]}" >"$out/$1.log" 2>&1
}

failed=0
: >"$out/summary.txt"
for group in "${groups[@]}"; do
  names=(${group//+/ })
  many=$(printf '%s\n' "${names[@]}" | grep -cE '^(tests|opdb|judge|plans|opdb_flaggems)(:|$)')
  jobs=${JOBS:-$((cores > 3 ? (cores - 2) / (many > 0 ? many : 1) : 1))}
  running=()
  for name in "${names[@]}"; do
    limit=${name#*:}
    name=${name%%:*}
    [ "$limit" = "$name" ] && limit=${seconds[$name]:-60}
    left=$((suite_end - SECONDS))
    [ $left -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 15 ]; then
      echo "$name: not run, the suite's time is up" | tee -a "$out/summary.txt"
      failed=1
      continue
    fi
    echo "== $name (at most $limit s, $jobs jobs)"
    (
      began=$SECONDS
      stage "$name" "$limit" "$jobs"
      code=$?
      case $code in
      0) said=ok ;;
      124 | 137) said="cut off" ;;
      *) said="exit code $code" ;;
      esac
      printf '%-14s %s, %s s\n' "$name" "$said" $((SECONDS - began)) >>"$out/summary.txt"
      echo "-- $name: $said"
      tail -n 25 "$out/$name.log"
      exit $code
    ) &
    running+=($!)
  done
  for process in "${running[@]}"; do
    wait "$process" || failed=1
  done
done
echo
cat "$out/summary.txt"
exit $failed
