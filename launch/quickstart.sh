#!/usr/bin/env bash
# From a bare machine to a model trained on preferences, and what it learnt: bash launch/quickstart.sh [MODEL]
#
# MODEL is a Hugging Face folder, a hub id or a builtin: name; without it, SmolLM2-135M-Instruct is fetched once.
# Two CPU cores are enough. Where there are GPUs they are used. Running it again reuses the environment, the model
# and the tokenized data. launch/environment.sh says what can be set from outside.
set -Eeuo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
trap on_failure ERR

case "${1:-}" in
    -h | --help)
        sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac
[ $# -le 1 ] || fail "one argument at most, the model; got $#" "usage: bash launch/quickstart.sh [MODEL]"
MODEL=${1:-}
# A folder is named from where the user stands; everything else happens in the project's folder.
if [ -d "$MODEL" ]; then MODEL=$(cd -- "$MODEL" && pwd); fi
cd "$PROJECT"

prepare_environment quickstart
quiet_libraries
command -v c++ >/dev/null || command -v g++ >/dev/null || note \
    "No C++ compiler here. The quickstart does without; DeepSpeed's fused optimizers and CPU offload need one" \
    "(on Debian or Ubuntu: apt install g++ python3-dev)."

overrides=()
if [ -z "$MODEL" ]; then
    get_default_model
else
    overrides+=("model.path=$MODEL")
fi

RANKS=$(python -c 'import torch; print(torch.cuda.device_count() or 2)')
# Without this, every rank takes all cores and they get in each other's way.
CORES=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > RANKS ? CORES / RANKS : 1))}
PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
RUN=runs/quickstart-$(date +%Y%m%d-%H%M%S)

stage "training with $RANKS ranks, into $RUN"
deepspeed --quiet --num_accelerators "$RANKS" --master_port "$PORT" \
    launch/train.py --config configs/quickstart.yaml "output_dir=$RUN" ${overrides[@]+"${overrides[@]}"}

stage "what it learnt"
python launch/quickstart_report.py --run "$RUN"
stage "done"
