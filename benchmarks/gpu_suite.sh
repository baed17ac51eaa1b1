#!/usr/bin/env bash
# Everything that needs a GPU, in one go, in under 25 minutes and without a network:
#
#   bash benchmarks/gpu_suite.sh [--only PART ...] [--minutes N] [--dry-run] [--output FOLDER]
#   bash benchmarks/gpu_suite.sh --readme [FILE]      put the tables of stored results into docs/gpus.md
#   bash benchmarks/gpu_suite.sh --list-wheels        what a host needs beside torch and transformers, and its weight
#
# WHEELS=folder installs what is missing from there, for this run alone. PYTHON names the interpreter (default:
# python3). The rest is said by --help and in benchmarks/gpu_suite.py.
set -uo pipefail
PROJECT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$PROJECT" || exit 2
PYTHON=${PYTHON:-python3}
command -v "$PYTHON" >/dev/null || {
    echo "error: no $PYTHON; name an interpreter with PYTHON=..." >&2
    exit 2
}
# The benchmarks need no installed dpo_scale, and no compiled code or settings from elsewhere.
export PYTHONPATH=$PROJECT${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$PYTHON" benchmarks/gpu_suite.py "$@"
