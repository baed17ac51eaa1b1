#!/usr/bin/env bash
# Train on several nodes under Slurm. Edit the #SBATCH lines to your cluster, then, from the project's folder:
#
#   sbatch launch/slurm.sh configs/llama-3.1-70b-multinode.yaml output_dir=runs/llama-70b [section.key=value ...]
#
# One Slurm task a node; torchrun starts a rank for each of the node's GPUs and all meet on the first node. Without GPUs
# (drop --gpus-per-node) it starts RANKS_PER_NODE of them, which is read from the environment. The project, its
# environment, the model and output_dir must be visible from every node under the same path.
#
#SBATCH --job-name=dpo_scale
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300

set -euo pipefail
# Slurm runs a copy of this file from elsewhere; the project is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?start this file with sbatch}"
CONFIG=${1:?usage: sbatch launch/slurm.sh CONFIG [section.key=value ...]}
shift
# The default output_dir has the start time in its name, but a resumed job must find the folder of the first one.
OUTPUT_DIR=$(sed -n 's/^output_dir: *//p' "$CONFIG" | tr -d "\"'")
for argument in "$@"; do
    [[ $argument == output_dir=* ]] && OUTPUT_DIR=${argument#output_dir=}
done
if [[ -z $OUTPUT_DIR ]]; then
    echo "error: give output_dir=FOLDER, so that the job can be resumed after a requeue" >&2
    exit 2
fi
# shellcheck source=/dev/null
source "${DPO_SCALE_VENV:-.venv}/bin/activate"

# A rank for each GPU of a node; where the job has no GPUs, as many as RANKS_PER_NODE says.
RANKS_PER_NODE=${SLURM_GPUS_ON_NODE:-${RANKS_PER_NODE:-}}
if [[ -z $RANKS_PER_NODE ]]; then
    echo "error: no GPUs were allocated (SLURM_GPUS_ON_NODE is not set); keep --gpus-per-node, or set RANKS_PER_NODE" >&2
    exit 2
fi
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Jobs that share a node must not share a port.
export MASTER_ADDR=$FIRST_NODE MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK > RANKS_PER_NODE ? SLURM_CPUS_PER_TASK / RANKS_PER_NODE : 1))
export TOKENIZERS_PARALLELISM=false
# If NCCL picks the wrong network, name the right one here: NCCL_SOCKET_IFNAME, and NCCL_IB_HCA with InfiniBand.

# Five minutes before the time limit Slurm sends SIGUSR1 to this script alone (--signal=B). The file tells the ranks, on
# whichever node, to finish their step, save and exit. When the nodes are wanted for another job, Slurm sends SIGTERM to
# all processes instead, and to this script; the ranks save then too, but torchrun ends them 30 s after its SIGTERM.
trap 'mkdir -p "$OUTPUT_DIR" && touch "$OUTPUT_DIR/stop"' USR1 TERM
mkdir -p "$OUTPUT_DIR"
rm -f "$OUTPUT_DIR/stop" "$OUTPUT_DIR/preempted.json" "$OUTPUT_DIR/lost.json"

# Any node that fails ends the job (--kill-on-bad-exit), rather than leaving the others to wait for it. A job that was
# requeued, or submitted again, goes on from the newest complete checkpoint in output_dir (--resume auto); for there
# to be one after a crash, the config sets checkpoint.save_steps.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="$RANKS_PER_NODE" \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
    launch/train.py --config "$CONFIG" --resume auto checkpoint.preempt_grace_seconds=270 "$@" &
STEP=$!
set +e
while kill -0 "$STEP" 2>/dev/null; do
    wait "$STEP" # also returns when a signal came
done
wait "$STEP"
CODE=$?

# The files tell what the exit code can't: torchrun returns 1 whatever a rank's code was, and a kill may come when all
# is done.
if [[ -e $OUTPUT_DIR/finished.json ]]; then
    exit 0
fi
if [[ -e $OUTPUT_DIR/preempted.json ]]; then
    echo "stopped to be resumed; back into the queue"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
# A rank that was killed or lost with its node may do better elsewhere; one that dies every time must come to an end.
if [[ -e $OUTPUT_DIR/lost.json && ${SLURM_RESTART_COUNT:-0} -lt 10 ]]; then
    echo "a rank was lost ($OUTPUT_DIR/lost.json); back into the queue"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $((CODE ? CODE : 1))
