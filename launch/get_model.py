"""Get a builtin model into the cache, once: `python launch/get_model.py [NAME]`. Prints its folder."""

from __future__ import annotations

import argparse
import os
import sys

from dpo_scale.models.builtin import BUILTIN_MODELS, ensure_builtin_model
from dpo_scale.run.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description="Download, verify and convert a builtin model, unless it is there.")
    parser.add_argument("name", nargs="?", default=next(iter(BUILTIN_MODELS)), help=f"one of {list(BUILTIN_MODELS)}")
    name = parser.parse_args().name
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported; the conversion would show several bars
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    print(ensure_builtin_model(name, log=lambda line: print(line, file=sys.stderr)))


if __name__ == "__main__":
    run(main)
