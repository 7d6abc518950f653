#!/usr/bin/env bash
# All that needs a GPU, for a machine that one has for a quarter of an hour: build, conformance tests, the headline
# benchmarks, profiles and sanitizers, in eight minutes at most.
#
#     benchmarks/gpu_check.sh [FOLDER]        FOLDER gets gpu_check.json, .md and .log and ncu.csv; build/gpu-check
#
#     PYTHON    an interpreter with torch, triton and what the tests need; nothing is downloaded; python3
#     BUILD     0 takes the vtw_kernels that PYTHON has; 1 builds this one, outside of FOLDER; 1
#     LIMIT     seconds for everything; 480. With more, each step has more in proportion; where little is left, it has less,
#               or none
#     JOBS      tests at a time, where pytest-xdist is there; 8, or fewer if there are fewer cores
#     TORCH_CUDA_ARCH_LIST   by default that of the card
#
# The report is written however it ends, if it is stopped as well. After a crash in `smoke`, every op once, nothing else
# is tried. Without a GPU, all that needs one is skipped. Exits with 1 if something failed; what was skipped is named.
set -u
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "PYTHON: expected an interpreter, got ${PYTHON:-python3}" >&2; exit 2; }
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
LIMIT=${LIMIT:-480} BUILD=${BUILD:-1} JOBS=${JOBS:-$(($(nproc) < 8 ? $(nproc) : 8))}
REPORT=20 # seconds kept for the report
OUT=${1:-$ROOT/build/gpu-check}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
rm -f -- "$OUT"/gpu_check.{json,md,log} "$OUT/ncu.csv" # of an earlier run
WORK=$(mktemp -d) && cd "$WORK" || exit 2 # not in the checkout: its package may have no binary
: >steps.tsv
running=

finish() {
    trap - EXIT TERM INT
    timeout "$REPORT" "$PYTHON" "$ROOT/benchmarks/gpu_report.py" "$ROOT" "$WORK" "$OUT"
    local rc=$?
    rm -rf "$WORK"
    exit "$rc"
}
trap finish EXIT
trap 'kill "$running"; printf "rest\tfailed\t\t\tstopped from outside\n" >>steps.tsv; finish' TERM INT

# scaled SECONDS: what a step has of LIMIT.
scaled() { echo $((LIMIT > 480 ? $1 * LIMIT / 480 : $1)); }

# step NAME SECONDS COMMAND...: runs it under a time limit, SECONDS of 480, with its output in NAME.log, and notes how it
# ended.
step() {
    local name=$1 left=$((LIMIT - REPORT - SECONDS)) start=$SECONDS seconds status
    seconds=$(scaled "$2")
    shift 2
    if [ "$left" -lt 10 ]; then skip "$name" "no time left"; return 1; fi
    [ "$seconds" -gt "$left" ] && seconds=$left
    echo "gpu_check: $name, at most $seconds s"
    # An interrupted pytest still writes what it has. In the background, so that a signal to this script is not kept
    # waiting; what is there has no input, and is deaf to interrupts, unless that is said.
    env --default-signal=INT timeout --signal=INT --kill-after=5 "$((seconds - 5))" "$@" <&0 >"$name.log" 2>&1 &
    running=$!
    wait "$running"
    local rc=$?
    case $rc in 0) status=passed ;; 124 | 137) status="out of time" ;; *) status=failed ;; esac
    printf '%s\t%s\t%s\t%s\t\n' "$name" "$status" "$rc" "$((SECONDS - start))" >>steps.tsv
    [ "$rc" -ne 0 ] && { echo "gpu_check: $name: $status; the end of its output:"; tail -n 15 "$name.log"; }
    return "$rc"
}

skip() {
    echo "gpu_check: $1: skipped: $2"
    printf '%s\tskipped\t\t\t%s\n' "$1" "$2" >>steps.tsv
}

# with TOOL NAME SECONDS COMMAND...: a step where the tool is there.
with() {
    local tool=$1
    shift
    if command -v "$tool" >/dev/null; then step "$@"; else skip "$1" "there is no $tool"; fi
}

step requirements 30 "$PYTHON" - <<'END' || exit
import sys
from importlib.metadata import PackageNotFoundError, version

missing = []
for name in ("torch", "transformers", "numpy", "matplotlib", "setuptools", "pybind11", "ninja", "pytest",
             "pytest-benchmark", "hypothesis"):
    try:
        version(name)
    except PackageNotFoundError:
        missing.append(name)
if missing:
    sys.exit(f"missing: {' '.join(missing)}; run: pip install {' '.join(missing)}")
END

gpu=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "")')
if [ -z "$gpu" ]; then
    export VTW_KERNELS_BUILD_CUDA=0
else
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$gpu}
fi

if [ "$BUILD" = 0 ]; then
    skip build "BUILD=0"
else
    step build 180 "$PYTHON" -m pip install --no-build-isolation --no-deps --upgrade --target "$WORK/site" "$ROOT" || exit
    export PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH}
fi
step info 30 "$PYTHON" -m vtw_kernels info || exit

if [ -z "$gpu" ]; then
    for name in smoke tests bench ncu memcheck synccheck racecheck; do skip "$name" "torch finds no GPU"; done
    exit
fi

step smoke 60 "$PYTHON" "$ROOT/benchmarks/gpu_smoke.py" || exit

# The CUDA kernels all of it; Triton's, of which each kind of tensor is compiled anew, a part. No other file is read, as
# that may need what is not here.
files=("$ROOT"/python_tests/test_{bad_input,compaction,compaction_paged,gpu,kl_divergence,packed,transforms,withdraw_gpu}.py)
workers=()
"$PYTHON" -c "import xdist" 2>/dev/null && workers=(--numprocesses "$JOBS" --dist worksteal --max-worker-restart 2)
step tests 120 "$PYTHON" -m pytest "${files[@]}" -p no:cacheprovider -q -m gpu "${workers[@]}" \
    -k "not triton or cuda_graph or other_stream or test_sizes or plan-images or NHD-prefix" --junitxml "$WORK/tests.xml"

step bench 110 "$PYTHON" "$ROOT/benchmarks/gpu_headline.py" "$WORK/bench.json" "$(scaled 80)"

# What predictions are made of (roofline.md), of six kernels. The clocks are left as they are found, as by the
# benchmarks.
metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,smsp__inst_executed.sum
metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active,sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active
metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
with ncu ncu 60 ncu --clock-control none --kernel-name "regex:move_kernel|forward_kernel|backward_kernel" \
    --metrics "$metrics" --csv --log-file "$OUT/ncu.csv" "$PYTHON" "$ROOT/benchmarks/gpu_profiled.py"

# The kernels' mangled names all contain their namespace. Without the caching allocator, every tensor has bounds.
sanitize() {
    local tool=$1
    shift
    with compute-sanitizer "$tool" 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
        --kernel-name kns=vtw --error-exitcode 9 "$PYTHON" -m pytest -p no:cacheprovider -q -m gpu -k "$*" \
        "$ROOT"/python_tests/test_{compaction,compaction_paged,kl_divergence}.py
}
sanitize memcheck "cuda and (plan-images or NHD-prefix or test_sizes and bfloat16)"
sanitize synccheck "cuda and (inplace and plan-images or test_sizes and bfloat16)"
sanitize racecheck "cuda and (inplace and plan-images or test_sizes and bfloat16)"
