#!/usr/bin/env bash
# All that needs a GPU, in ten minutes at most: build, conformance tests, sanitizers, benchmarks and profiles.
#
#     benchmarks/gpu_check.sh [FOLDER]        FOLDER gets gpu_check.json, gpu_check.md and the logs; build/gpu-check
#
#     PYTHON    an interpreter with torch, triton and what the tests need; nothing is downloaded; python3
#     BUILD     0 takes the vtw_kernels that PYTHON has; 1 builds this one into FOLDER; 1
#     LIMIT     seconds for everything; what finds no time left is skipped; 600
#     JOBS      tests at a time, where pytest-xdist is there; 8, or fewer if there are fewer cores
#     TORCH_CUDA_ARCH_LIST   by default that of the card
#
# Without a GPU, all that needs one is skipped. Exits with 1 if something failed; what was skipped is named.
set -u
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "PYTHON: expected an interpreter, got ${PYTHON:-python3}" >&2; exit 2; }
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
LIMIT=${LIMIT:-600} BUILD=${BUILD:-1} JOBS=${JOBS:-$(($(nproc) < 8 ? $(nproc) : 8))}
OUT=${1:-$ROOT/build/gpu-check}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && cd "$OUT" || exit 2 # not in the checkout: its package may have no binary
rm -f -- steps.tsv tests.xml bench.json bench-compaction.json bench-kl.json bench-withdraw.json # of an earlier run

# step NAME SECONDS COMMAND...: runs it under a time limit, with its output in NAME.log, and notes how it ended.
step() {
    local name=$1 seconds=$2 left=$((LIMIT - SECONDS)) start=$SECONDS status
    shift 2
    if [ "$left" -lt 10 ]; then skip "$name" "no time left"; return 1; fi
    [ "$seconds" -gt "$left" ] && seconds=$left
    echo "gpu_check: $name, at most $seconds s"
    # An interrupted pytest still writes what it has.
    timeout --signal=INT --kill-after=15 "$seconds" "$@" >"$name.log" 2>&1
    local rc=$?
    case $rc in 0) status=passed ;; 124 | 137) status="out of time" ;; *) status=failed ;; esac
    printf '%s\t%s\t%s\t%s\t\n' "$name" "$status" "$rc" "$((SECONDS - start))" >>steps.tsv
    [ "$rc" -ne 0 ] && { echo "gpu_check: $name: $status; the end of $OUT/$name.log:"; tail -n 15 "$name.log"; }
    return "$rc"
}

skip() {
    echo "gpu_check: $1: skipped: $2"
    printf '%s\tskipped\t\t\t%s\n' "$1" "$2" >>steps.tsv
}

finish() {
    "$PYTHON" "$ROOT/benchmarks/gpu_report.py" "$ROOT" "$OUT"
    exit
}

step requirements 60 "$PYTHON" - <<'END' || finish
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
    no_gpu="torch finds no GPU"
else
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$gpu}
fi

if [ "$BUILD" = 0 ]; then
    skip build "BUILD=0"
else
    step build 240 "$PYTHON" -m pip install --no-build-isolation --no-deps --upgrade --target "$OUT/site" "$ROOT" || finish
    export PYTHONPATH=$OUT/site${PYTHONPATH:+:$PYTHONPATH}
fi
step info 60 "$PYTHON" -m vtw_kernels info || finish

if [ -z "$gpu" ]; then
    for name in tests memcheck racecheck initcheck ncu bench-compaction bench-kl bench-withdraw; do skip "$name" "$no_gpu"; done
    step bench 120 "$PYTHON" -m vtw_kernels bench --device cpu --op compact_ --op plan_compaction \
        --model-shape llava-1.5-7b --json bench.json -- --benchmark-max-time 0.05 --benchmark-min-rounds 3
    finish
fi

workers=()
"$PYTHON" -c "import xdist" 2>/dev/null && workers=(--numprocesses "$JOBS" --dist worksteal)
step tests 180 "$PYTHON" -m pytest "$ROOT/python_tests" -p no:cacheprovider -m gpu "${workers[@]}" --junitxml "$OUT/tests.xml"

bench() {
    local name=$1
    shift
    step "$name" 100 "$PYTHON" -m vtw_kernels bench --device cuda --json "$name.json" "$@"
}
quick=(--benchmark-max-time 0.2)
bench bench --op compact_ --op kl_divergence --model-shape llava-1.5-7b --model-shape qwen2.5-vl-7b --dtype bf16 \
    -- "${quick[@]}" -k "not gradient"

# The kernels' mangled names all contain their namespace. Without the caching allocator, every tensor has bounds.
table=("$ROOT/python_tests/test_compaction.py" "$ROOT/python_tests/test_compaction_paged.py"
    "$ROOT/python_tests/test_kl_divergence.py" -m gpu -k "cuda and (plan-images or NHD-prefix or test_sizes and bfloat16)")
for tool in memcheck racecheck initcheck; do
    if command -v compute-sanitizer >/dev/null; then
        step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --kernel-name kns=vtw \
            --error-exitcode 9 "$PYTHON" -m pytest -p no:cacheprovider -q "${table[@]}"
    else
        skip "$tool" "there is no compute-sanitizer"
    fi
done

if command -v ncu >/dev/null; then
    # The clocks are left as they are found, as by the benchmarks.
    step ncu 60 ncu --clock-control none --kernel-name "regex:move_kernel|forward_kernel" --launch-count 2 \
        --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy --section LaunchStats \
        --csv --log-file ncu.csv \
        "$PYTHON" -c '
import torch
import vtw_kernels as vtw
from vtw_kernels.bench import MODELS

model = MODELS["llava-1.5-7b"]
keep = torch.ones(1, model.tokens, dtype=torch.bool, device="cuda")
keep[:, model.before : model.before + model.visual] = False
size = (1, model.kv_heads, model.tokens, model.head_dim)
cache = [torch.randn(size, dtype=torch.bfloat16, device="cuda") for _ in range(2 * model.layers)]
vtw.compact_(cache, vtw.plan_compaction(keep, length=model.text), token_dims=2)
p, q = torch.randn(2, 128, 151_936, dtype=torch.bfloat16, device="cuda")
vtw.kl_divergence(p, q)
torch.cuda.synchronize()
'
else
    skip ncu "there is no ncu"
fi

bench bench-compaction --op plan_compaction --op compact --op compact_paged_ --op expand --model-shape llava-1.5-7b \
    -- "${quick[@]}"
bench bench-withdraw --op withdraw --op search -- "${quick[@]}"
bench bench-kl --op kl_divergence --op kl_divergence_loss --op linear_kl_divergence --model-shape llava-1.5-7b --dtype bf16 \
    -- "${quick[@]}" -k "gradient or linear"
finish
