#!/usr/bin/env bash
# One visit to a GPU machine: what exists there, the GPU tests, the benchmarks against the peers. Results go to $OUT (default: benchmarks/results/gpu).
# Needs python3 with torch and triton; builds the C++ operators if a compiler is there. Every step runs even if an earlier one fails.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/gpu}
mkdir -p "$OUT"
status=0
step() {
    local name=$1
    shift
    echo "== $name"
    local start=$SECONDS
    if "$@" >"$OUT/$name.log" 2>&1; then
        echo "   ok, $((SECONDS - start)) s"
    else
        status=1
        echo "   FAILED, $((SECONDS - start)) s; the end of its log:"
        tail -n 20 "$OUT/$name.log"
    fi
}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
nvidia-smi >"$OUT/nvidia-smi.log" 2>&1 || { echo "no NVIDIA GPU on this machine"; exit 1; }
ls vlpfast/_C.so >/dev/null 2>&1 || step build python3 setup.py build_ext --inplace
step doctor python3 -m vlpfast.cli.doctor
step tests python3 -m pytest -q -m gpu tests
step contrastive python3 benchmarks/contrastive.py --device cuda --json "$OUT/contrastive-cuda.json"
exit $status
