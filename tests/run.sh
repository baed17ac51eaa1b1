#!/usr/bin/env bash
# The whole test-suite from a bare machine: bash tests/run.sh [pytest's arguments]
#
# Uses the quickstart's environment and model, with the test tools added. Style and types are checked first, because
# that is quick. launch/environment.sh says what can be set from outside.
set -Eeuo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch/environment.sh"
trap on_failure ERR
cd "$PROJECT"

prepare_environment test
quiet_libraries
get_default_model

# Tests start up to two ranks of their own; more threads each would only contend, and change sums in the last bit.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

stage "style"
ruff check --quiet .
ruff format --check --quiet .
lint-imports --no-cache
mypy

trap - ERR # pytest's closing line is the verdict, and the last line
if (($#)); then
    stage "tests"
    exec python -m pytest "$@" </dev/null
fi
stage "quick tests, on all cores"
python -m pytest -m "not slow" -n auto --dist loadfile </dev/null
stage "slow tests, one after another: they start ranks of their own"
python -m pytest -m slow </dev/null
