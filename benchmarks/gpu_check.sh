#!/usr/bin/env bash
# Visits to a GPU machine without a network: build, GPU tests, a sanitizer run, benchmarks against the peers.
#   benchmarks/gpu_check.sh [tests|benchmarks]    one of the two parts; none: both
#   OUT=folder      where everything is written (default: benchmarks/results/gpu)
#   PEERS=folder    wheels of other packages to compare with (memeff, inf-cl, cut-cross-entropy, liger-kernel,
#                   late-interaction-kernels, flash-maxsim) and of pytest with pytest-xdist (hypothesis for one file of tests more) where they are missing;
#                   installed beside
# Needs python3 with torch and triton; builds the C++ operators if a compiler is there. Every step runs even if an earlier one
# fails, each within its own limit: each part ends within 9 minutes. The summary stands last and in $OUT/summary.txt.
set -uo pipefail
part=${1:-all}
case $part in all | tests | benchmarks) ;; *) echo "gpu_check.sh: expected tests, benchmarks or nothing, got $part" >&2; exit 2 ;; esac
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/gpu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
: >"$OUT/summary.txt"
status=0
say() { echo "$@" | tee -a "$OUT/summary.txt"; }
step() { # NAME LIMIT COMMAND...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    local start=$SECONDS
    if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then
        say "$name: ok, $((SECONDS - start)) s"
    else
        local code=$?
        status=1
        say "$name: FAILED (exit $code, 124 is the limit of $limit s), $((SECONDS - start)) s; see $name.log"
        tail -n 20 "$OUT/$name.log"
    fi
}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
nvidia-smi >"$OUT/nvidia-smi.log" 2>&1 || { echo "no NVIDIA GPU on this machine"; exit 1; }
say "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader), commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
if [ -n "${PEERS:-}" ]; then
    step peers 30 python3 -m pip install --quiet --no-index --no-deps --target "$OUT/peers" "$PEERS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$OUT/peers"
fi
[ -e vlpfast/_C.so ] || step build 60 python3 setup.py build_ext --inplace
if [ "$part" != benchmarks ]; then
    step doctor 60 python3 -m vlpfast.cli.doctor
    workers=() # most of the tests' time is compiling kernels
    python3 -c "import xdist" 2>/dev/null && workers=(-n 8)
    step tests 320 python3 -m pytest -q -m gpu "${workers[@]}" tests
    if command -v compute-sanitizer >/dev/null; then
        step sanitizer 45 compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m pytest -q -m gpu tests/ops -k "17x17x8 or offset"
    else
        say "sanitizer: not run, compute-sanitizer is not on this machine"
    fi
fi
if [ "$part" != tests ]; then
    step contrastive 120 python3 benchmarks/contrastive.py --device cuda --json "$OUT/contrastive-cuda.json"
    for name in maxsim tokens temporal; do
        step $name 60 python3 benchmarks/$name.py --device cuda --json "$OUT/$name-cuda.json"
    done
    step vit 120 python3 benchmarks/vit.py --device cuda --json "$OUT/vit-cuda.json"
fi
rm -rf "$OUT/peers"
for name in contrastive maxsim tokens temporal vit; do
    [ "$part" = tests ] || tail -n +3 "$OUT/$name.log" >>"$OUT/summary.txt"
done
echo
cat "$OUT/summary.txt"
exit $status
