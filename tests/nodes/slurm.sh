#!/usr/bin/env bash
# launch/slurm.sh under a real Slurm: bash tests/nodes/slurm.sh
#
# Two machines out of namespaces get a controller and two daemons, from Debian packages that are unpacked into a
# temporary folder: nothing is installed, and nothing is left at the end. A job of two nodes with one rank each, on CPUs,
# gets the signal that announces its time limit; it must save, go back into the queue, and finish. That takes about four
# minutes, since Slurm holds a requeued job back for two. Needs root, apt-get, iproute2 and a Python with the project's
# test tools on PATH, which is made otherwise.
set -Eeuo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../../launch/environment.sh"
trap on_failure ERR
cd "$PROJECT"
python -c 'import deepspeed, pytest, dpo_scale' 2>/dev/null || prepare_environment test

FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
stage "Slurm's packages"
for tool in apt-get dpkg; do command -v "$tool" >/dev/null || fail "no $tool here: Slurm comes as Debian packages"; done
mkdir "$FOLDER/packages" "$FOLDER/unpacked" "$FOLDER/run"
chmod 755 "$FOLDER" "$FOLDER/packages"
PACKAGES=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins libhwloc15 liblua5.1-0 libmunge2)
(cd "$FOLDER/packages" && apt-get download "${PACKAGES[@]}" >apt.log 2>&1) ||
    fail "these packages can't be had: ${PACKAGES[*]}" "$(tail -n 1 "$FOLDER/packages/apt.log")" "Try apt-get update first."
for package in "$FOLDER"/packages/*.deb; do dpkg -x "$package" "$FOLDER/unpacked"; done

stage "a job that is told of its time limit"
PYTHONPATH=$PROJECT python tests/nodes/slurm.py "$FOLDER/unpacked" "$FOLDER/run"
stage "done"
