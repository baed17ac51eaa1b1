#!/usr/bin/env bash
# Train on several nodes under Slurm. Edit the #SBATCH lines to your cluster, then, from the project's folder:
#
#   sbatch launch/slurm.sh configs/llama-3.1-70b-multinode.yaml output_dir=runs/llama-70b [section.key=value ...]
#
# One Slurm task a node; torchrun starts a rank for each of the node's GPUs and all meet on the first node. The
# project, its environment, the model and output_dir must be visible from every node under the same path.
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

set -euo pipefail
# Slurm runs a copy of this file, so its own place says nothing: the project is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?start this file with sbatch}"
CONFIG=${1:?usage: sbatch launch/slurm.sh CONFIG [section.key=value ...]}
shift
# The default output_dir has the time of the start in its name; a resumed job must find the folder of the first.
if ! grep -q '^output_dir:' "$CONFIG" && ! printf '%s\n' "$@" | grep -q '^output_dir='; then
    echo "error: give output_dir=FOLDER, so that the job can be resumed after a requeue" >&2
    exit 2
fi
# shellcheck source=/dev/null
source "${DPO_SCALE_VENV:-.venv}/bin/activate"

GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:?no GPUs were allocated; keep --gpus-per-node}
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Jobs that share a node must not share a port.
export MASTER_ADDR=$FIRST_NODE MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / GPUS_PER_NODE))
export TOKENIZERS_PARALLELISM=false
# If NCCL picks the wrong network, name the right one here: NCCL_SOCKET_IFNAME, and NCCL_IB_HCA with InfiniBand.

# Any node that fails ends the job (--kill-on-bad-exit), rather than leaving the others to wait for it. A job that was
# requeued, or submitted again, goes on from the newest complete checkpoint in output_dir (--resume auto); for there
# to be one, the config sets checkpoint.save_steps.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="$GPUS_PER_NODE" \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
    launch/train.py --config "$CONFIG" --resume auto "$@"
