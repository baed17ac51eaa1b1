#!/usr/bin/env bash
# Everything that needs a GPU, in one go: bash benchmarks/gpu_suite.sh [--dry-run] [RESULTS_FOLDER]
#
# Runs the tests of the log-prob kernels natively, then the benchmarks, and stores results in RESULTS_FOLDER, or else
# in benchmarks/results/<device>/. A part that fails is reported and the others still run; the exit code is 1 if any
# failed, 2 if the host lacks what all parts need. It ends within 20 minutes.
#
# The host may have no network. What is missing is listed with the command that fetches its wheels elsewhere; then
#   WHEELS=folder bash benchmarks/gpu_suite.sh
# installs them from that folder, without touching anything that is already there.
#
# --dry-run goes through the same motions in a minute or two, on a CPU if need be, with the smallest case, and leaves
# stored results alone.
# PYTHON names the interpreter (default: python3).
set -uo pipefail
PROJECT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$PROJECT" || exit 2
PYTHON=${PYTHON:-python3}

dry_run=false
output=()
for argument in "$@"; do
    case $argument in
        -h | --help)
            sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --dry-run) dry_run=true ;;
        -*)
            echo "error: unknown option $argument; --dry-run and a folder are known" >&2
            exit 2
            ;;
        *) output=(--output "$(mkdir -p -- "$argument" && cd -- "$argument" && pwd)") || exit 2 ;;
    esac
done
if $dry_run && [ ${#output[@]} -eq 0 ]; then
    output=(--output "$(mktemp -d)") || exit 2
fi

stage() { printf '\n[%4ds] %s\n' "$SECONDS" "$1"; }

failed=()
part() { # part NAME SECONDS COMMAND...: run a part, end it after so long, remember if it failed
    local name=$1 limit=$2 code
    shift 2
    stage "$name"
    timeout --kill-after=15 "$limit" "$@" </dev/null
    code=$?
    if [ "$code" -ne 0 ]; then
        [ "$code" -ne 124 ] || echo "ended after $limit s" >&2
        echo "error: this part failed (exit code $code): $name" >&2
        failed+=("$name")
    fi
}

missing() { # print those of the modules (as MODULE or MODULE=WHEEL) whose wheels have to be installed
    "$PYTHON" - "$@" <<'PY'
import sys
from importlib.util import find_spec

for argument in sys.argv[1:]:
    module, _, wheel = argument.partition("=")
    if find_spec(module) is None:
        print(wheel or module)
PY
}

NEEDED=(numpy pytest torch triton)
# Without these a part of the comparison is absent from the table: peers, the training step, plots.
WANTED=(transformers accelerate datasets deepspeed trl liger_kernel=liger-kernel cut_cross_entropy=cut-cross-entropy
    matplotlib)

# The benchmarks need no installed dpo_scale, and no compiled code or settings from elsewhere.
export PYTHONPATH=$PROJECT${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

stage "what is here"
"$PYTHON" --version || {
    echo "error: no $PYTHON; name an interpreter with PYTHON=..." >&2
    exit 2
}
if [ -n "${WHEELS:-}" ]; then
    mapfile -t absent < <(missing "${NEEDED[@]}" "${WANTED[@]}")
    for wheel in "${absent[@]}"; do
        # One by one and without dependencies: what can't be had must not keep the rest away, nor replace what is there.
        "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" "$wheel" </dev/null ||
            echo "note: $wheel was not installed from $WHEELS" >&2
    done
fi
mapfile -t lacking < <(missing "${NEEDED[@]}")
mapfile -t without < <(missing "${WANTED[@]}")
if $dry_run; then # the CPU build of torch brings no Triton
    kept=()
    for wheel in "${lacking[@]}"; do [ "$wheel" = triton ] || kept+=("$wheel"); done
    lacking=("${kept[@]+"${kept[@]}"}")
fi
if [ ${#lacking[@]} -gt 0 ] || [ ${#without[@]} -gt 0 ]; then
    echo "not installed, needed: ${lacking[*]:-none}; wanted: ${without[*]:-none}"
    echo "fetch with network, for the same Python and platform, then run again with WHEELS=wheels:"
    echo "    pip download --dest wheels ${lacking[*]-} ${without[*]-}"
fi
[ ${#lacking[@]} -eq 0 ] || exit 2

device=cuda
if ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    if ! $dry_run; then
        echo "error: torch finds no GPU here" >&2
        exit 2
    fi
    device=cpu
fi
"$PYTHON" - <<'PY'
import torch

print("torch", torch.__version__)
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
PY

# Settings of the tools that may be missing here (pytest-timeout) would be errors, so the project's are left aside.
tests=()
for file in tests/unit/test_logprobs*.py tests/unit/test_triton*.py tests/unit/test_pair_loss*.py \
    tests/unit/test_benchmarks.py; do
    [ ! -e "$file" ] || tests+=("$file")
done
pytest=("$PYTHON" -m pytest -c /dev/null --rootdir "$PROJECT" --import-mode=importlib -p no:cacheprovider -q
    -W ignore::pytest.PytestUnknownMarkWarning)
if $dry_run; then
    part "tests on $device" 120 "${pytest[@]}" tests/unit/test_benchmarks.py
    part "log-probs" 180 "$PYTHON" benchmarks/logprobs.py --device "$device" --shapes 64x4096 --tokens 64 --repeats 2 \
        --implementations naive chunked log_softmax trl "${output[@]}"
    step=(--layers 1 --completion-tokens 8)
else
    part "tests on $device" 300 "${pytest[@]}" "${tests[@]}"
    part "log-probs" 540 "$PYTHON" benchmarks/logprobs.py --device "$device" --minutes 8 --case-seconds 4 \
        --shapes Llama-3-8B Qwen2.5-7B Gemma-2-2B SmolLM2-135M "${output[@]+"${output[@]}"}"
    step=(--pairs 4 --completion-tokens 512)
fi
if [[ " ${without[*]-} " == *" transformers "* ]]; then
    stage "memory of a training step: left out, transformers is not installed"
else
    part "memory of a training step" 120 "$PYTHON" benchmarks/step_memory.py --device "$device" "${step[@]}" \
        "${output[@]+"${output[@]}"}"
fi

if [[ " ${without[*]-} " =~ " transformers " || " ${without[*]-} " =~ " deepspeed " || " ${without[*]-} " =~ " datasets " ]]; then
    stage "throughput of training: left out, transformers, deepspeed or datasets is not installed"
elif $dry_run; then
    part "throughput of training" 180 "$PYTHON" benchmarks/throughput.py --device "$device" --quick --dtype float32 \
        --model shape:tiny --data generated --ratios 1 --layouts shared_prefix --references store "${output[@]}"
else
    part "throughput of training" 300 "$PYTHON" benchmarks/throughput.py --device "$device" --repeats 1 \
        --model shape:llama-3.2-1b --data generated --ratios 0.4 2 --tokens-per-pair 2000 --max-length 4096 \
        --max-tokens 16384 --global-batch-size 32 --layouts packed shared_prefix --references store \
        --trl-batch-sizes 4 --trl-kinds same compiled "${output[@]+"${output[@]}"}"
fi

stage "done"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all parts succeeded"
