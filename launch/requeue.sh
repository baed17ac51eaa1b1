#!/usr/bin/env bash
# What a queue does, on one machine: run a training command, and run it again whenever it stopped to be resumed or lost
# a rank (killed, crashed, or gone with its node), from the newest checkpoint.
#
#   bash launch/requeue.sh TRIES deepspeed --num_gpus 8 launch/train.py --config FILE output_dir=FOLDER [...]
#
# `--resume auto` is added to the command. Exit codes:
#   0    the run is finished: finished.json is in its folder, which only a whole success writes
#   75   it stopped to be resumed, and there are no tries left, or this script was told to end (SIGTERM, SIGUSR1)
#   71   it lost a rank, and there are no tries left
#   else the run failed; it is not tried again
#
# Neither this script nor launch/slurm.sh trusts the launcher's exit code alone. torchrun returns 1 whatever a rank's
# code was, and deepspeed returns 0 if its own child was killed. What counts is which of finished.json, preempted.json
# and lost.json is in the run folder.
set -uo pipefail

[[ ${1:-} =~ ^[1-9][0-9]*$ && $# -ge 2 ]] || {
    echo "usage: bash launch/requeue.sh TRIES COMMAND output_dir=FOLDER [...]" >&2
    exit 2
}
tries=$1
shift
output_dir=
for argument in "$@"; do
    [[ $argument == output_dir=* ]] && output_dir=${argument#output_dir=}
done
[[ -n $output_dir ]] || {
    echo "error: give output_dir=FOLDER, which is where a run is found again" >&2
    exit 2
}

rm -f "$output_dir/stop"
told=
# The file reaches the ranks through any launcher; a signal would end the launcher as well.
trap 'told=yes; mkdir -p "$output_dir" && touch "$output_dir/stop"' TERM USR1

for ((try = 1; try <= tries; try++)); do
    rm -f "$output_dir/preempted.json" "$output_dir/lost.json"
    "$@" --resume auto &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        wait "$child" # also returns when a signal came
    done
    wait "$child"
    code=$?
    # A launcher that was killed leaves ranks that are still saving; the run folder is locked until they are done.
    [[ -e $output_dir/logs/lock ]] && flock --wait 600 "$output_dir/logs/lock" true

    [[ -e $output_dir/finished.json ]] && exit 0
    if [[ -e $output_dir/preempted.json || $code -eq 75 ]]; then
        echo "try $try: stopped to be resumed (exit code $code)"
        end=75
    elif [[ -e $output_dir/lost.json || $code -eq 71 ]]; then
        echo "try $try: lost a rank (exit code $code)" >&2
        end=71
    else
        echo "try $try: failed with exit code $code" >&2
        exit $((code ? code : 1))
    fi
    [[ -n $told ]] && exit 75
done
exit "$end"
