#!/usr/bin/env bash
# On a CUDA machine: build with SPCXR_CUDA=ON, the C++ tests, the op tests on the GPU, the op
# benchmarks, memory and race checks. Within ten minutes, and without a network: the environment named
# by PYTHON (default .venv, else python3) must hold torch >= 2.11, cmake, ninja, pybind11, pytest and
# pytest-benchmark; for the demo also pydicom and monai.
# Results: benchmarks/results/<device>/*.json and gpu_check.txt.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { echo "gpu-check: $*" >&2; exit 1; }

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
"$PYTHON" -c 'import torch' || die "$PYTHON has no torch; name another with PYTHON=..."
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
    || die "no GPU: torch sees no CUDA device here"
has() { "$PYTHON" -c 'import importlib, sys; [importlib.import_module(m) for m in sys.argv[1:]]' "$@" 2>/dev/null; }
for module in pybind11 pytest pytest_benchmark; do
    has "$module" || die "$PYTHON has no $module; install it, or name another with PYTHON=..."
done
command -v nvcc >/dev/null || die "no nvcc on PATH; install the CUDA toolkit"
log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT

say() { echo "$*" | tee -a "$log/summary"; }
failed=0
step() { # step NAME COMMAND...: run, time, note the outcome, go on
    local name=$1 began=$SECONDS left=$((600 - SECONDS))
    shift
    if [ "$left" -le 0 ]; then
        say "NOT RUN $name: the ten minutes are over"
        failed=1
    elif timeout "$((left < 300 ? left : 300))" "$@" >"$log/out" 2>&1; then
        say "ok      $name ($((SECONDS - began)) s): $(tail -n 1 "$log/out")"
    else
        say "FAILED  $name ($((SECONDS - began)) s)"
        tail -n 40 "$log/out"
        failed=1
    fi
}
sanitized() { # compute-sanitizer's TOOL over the native op tests; where it cannot attach, say so
    local said
    if ! command -v compute-sanitizer >/dev/null; then
        say "NOT RUN $1: no compute-sanitizer on PATH"
        return
    fi
    # Not a pipe into grep: it fails as a whole (pipefail) just when the device is refused.
    said=$(timeout 60 compute-sanitizer --tool "$1" "$PYTHON" -c \
        'import torch; torch.zeros(1, device="cuda")' 2>&1 || true)
    if [[ $said == *"Device not supported"* ]]; then
        say "NOT RUN $1: compute-sanitizer does not support this device or its driver's sandbox"
    else
        step "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" \
            --error-exitcode 9 "$PYTHON" -m pytest -q -m gpu -k native tests/ops
    fi
}

export SPCXR_CUDA=ON SPCXR_REQUIRE_BACKENDS=native
step build "$PYTHON" -m pip install --no-build-isolation --no-deps --editable .
[ "$failed" = 0 ] || die "the build failed: nothing to test"
step "ctest configure" cmake -S . -B build/gpu -DSPCXR_CUDA=ON -DPython_EXECUTABLE="$(command -v "$PYTHON")"
step "ctest build" cmake --build build/gpu --parallel
step ctest ctest --test-dir build/gpu --output-on-failure
# By file: the others would want what a GPU machine's environment may lack (pydicom, monai).
mapfile -t marked < <(grep -rl --include='test_*.py' 'pytest\.mark\.gpu\b' tests)
step "pytest -m gpu" "$PYTHON" -m pytest -q -m gpu "${marked[@]}"
step "pytest tests/ops (CPU)" "$PYTHON" -m pytest -q -m "not gpu and not slow" tests/ops
# A recipe in bf16 on the GPU, small: it must run and its figures must be finite.
if has pydicom monai; then
    step "demo on the GPU" "$PYTHON" -c 'from spcxr.cli import train; train()' demo --out "$log/demo" \
        --device cuda --phantom-count 60 --pretrain-epochs 2 --classify-epochs 2 --segment-epochs 2
else
    say "NOT RUN demo on the GPU: $PYTHON lacks pydicom or monai"
fi
for bench in benchmarks/bench_*.py; do
    # Benchmarks of ops only; those of files and recipes say nothing about the GPU.
    [ -f "spcxr/ops/$(basename "$bench" .py | sed s/^bench_//).py" ] || continue
    # -k cuda: the tests on the device; the CPU's figures are not this script's business.
    : >"$log/out"
    step "$(basename "$bench")" "$PYTHON" -m pytest -k cuda "$bench"
    grep '^MISSED' "$log/out" | tee -a "$log/summary" || true
done
# Last, since they are slow: what is left of the ten minutes is theirs.
sanitized memcheck
sanitized racecheck

folder=$("$PYTHON" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
mkdir -p "benchmarks/results/$folder"
{
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    "$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
    git rev-parse --short=12 HEAD 2>/dev/null | sed 's/^/commit /' || true
    cat "$log/summary"
} >"benchmarks/results/$folder/gpu_check.txt"
echo "benchmarks/results/$folder/gpu_check.txt"
exit $failed
