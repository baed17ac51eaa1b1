# Sourced by launch/quickstart.sh and tests/run.sh: the project's virtual environment, made once and kept current.
#
# What the caller may set beforehand:
#   PYTHON            the interpreter to build the environment with; pyproject.toml says which versions will do
#   DPO_SCALE_VENV    where the environment lives (default: .venv in the project folder)
#   DPO_SCALE_CACHE   where models and tokenized data live (default: ~/.cache/dpo_scale)
# shellcheck shell=bash

PROJECT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${DPO_SCALE_VENV:-$PROJECT/.venv}
STAGE="starting"

stage() { # print a stage's name after the seconds since the script began, and keep it for `on_failure`
    STAGE=$1
    printf '[%4ds] %s\n' "$SECONDS" "$STAGE"
}

note() { printf '        %s\n' "$@"; }

fail() { # one line on what is wrong, further lines on what to do about it
    printf 'error: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '       %s\n' "$@" >&2
    trap - ERR
    exit 1
}

on_failure() {
    local code=$?
    printf 'error: this step failed (exit code %d): %s\n' "$code" "$STAGE" >&2
    trap - ERR
    exit "$code"
}

# The minor versions of Python 3 that will do: from the first, up to but not including the second.
read -r PYTHON_FROM PYTHON_BELOW < <(
    sed -nE 's/^requires-python = ">=3\.([0-9]+),<3\.([0-9]+)".*/\1 \2/p' "$PROJECT/pyproject.toml"
) || fail "pyproject.toml has no line of the form: requires-python = \">=3.A,<3.B\""
PYTHONS="Python 3.$PYTHON_FROM to 3.$((PYTHON_BELOW - 1))"

usable_python() { # does this interpreter have the right version, and can it make virtual environments?
    "$1" -c "import sys, venv, ensurepip; sys.exit(not (3, $PYTHON_FROM) <= sys.version_info < (3, $PYTHON_BELOW))" \
        >/dev/null 2>&1
}

find_python() { # print the interpreter to use
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        usable_python "$PYTHON" || fail "PYTHON=$PYTHON is not $PYTHONS with the venv module"
        echo "$PYTHON"
        return
    fi
    # The user's own first, then from the newest down.
    for candidate in python3 $(seq -f 'python3.%g' "$((PYTHON_BELOW - 1))" -1 "$PYTHON_FROM") python; do
        if usable_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no $PYTHONS with the venv module was found" \
        "On Debian or Ubuntu: apt install python3 python3-venv python3-dev" \
        "Or name one that is elsewhere: PYTHON=/path/to/python3 bash $0"
}

prepare_environment() { # $1: the extras to install, e.g. "quickstart"; afterwards the environment is first on PATH
    local extras=$1 python stamp wanted
    stage "Python environment in $VENV"
    if ! usable_python "$VENV/bin/python"; then
        python=$(find_python) || exit # it has said why
        "$python" -m venv --clear "$VENV"
        note "made with $("$python" --version) ($python)"
    fi
    export VIRTUAL_ENV=$VENV PATH="$VENV/bin:$PATH"
    stamp=$VENV/.dpo_scale-$extras
    # The project's folder is part of the stamp, because the environment points to it.
    wanted=$(cd "$PROJECT" && { pwd; cat constraints.txt pyproject.toml setup.cfg; } | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        note "up to date"
        return
    fi
    stage "installing the project with tested versions (the first time this takes some minutes)"
    if ! has_gpu && [ "$(uname -m)" = x86_64 ]; then
        note "No NVIDIA GPU here. PyTorch's default build for Linux brings about 3 GB of CUDA libraries; to have its" \
            "CPU build instead, put the index that pytorch.org names under \"CPU\" into PIP_EXTRA_INDEX_URL."
    fi
    (cd "$PROJECT" && python -m pip install --quiet --quiet --disable-pip-version-check --no-input \
        --constraint constraints.txt --editable ".[$extras]" </dev/null)
    printf '%s\n' "$wanted" >"$stamp"
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

quiet_libraries() { # hide what libraries print at every start and nobody acts on
    export TOKENIZERS_PARALLELISM=false TF_CPP_MIN_LOG_LEVEL=3
    export PYTHONWARNINGS="ignore::FutureWarning:torch.distributed.c10d_logger"
    # DeepSpeed warns about a missing GPU at every import, unless it is told that there is none.
    has_gpu || export DS_ACCELERATOR=cpu
}

get_default_model() {
    stage "the small model (SmolLM2-135M-Instruct)"
    python "$PROJECT/launch/get_model.py" >/dev/null
}
