"""What every launch script does around its work: parse, run, and say one thing when something is wrong."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable

import yaml

from dpo_scale.config import Config
from dpo_scale.config_reader import list_keys, to_mapping
from dpo_scale.errors import UserError

EXIT_USER_ERROR = 2
SECONDS_TO_SPEAK_FIRST = 5.0


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser for `--config FILE section.key=value ...`; its help lists every option with type and default."""
    options = "\n".join(f"  {key} ({kind}; default {default!r})" for key, kind, default in list_keys(Config))
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"options, in the file or as section.key=value:\n{options}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; without one, the defaults and the overrides")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values are YAML")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    # the launchers of torch and DeepSpeed add this one; ranks are read from the environment
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def print_config(config: Config) -> None:
    """What `--print-config` prints: the resolved tree as YAML."""
    yaml.safe_dump(to_mapping(config), sys.stdout, sort_keys=False)


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit; a `UserError` is one line and exit code 2, on whichever ranks it arose.

    A launcher ends all ranks as soon as one exits. So the rank that knows best speaks at once and the others wait,
    to be ended before they add to it: a rank other than 0 mostly fails for rank 0's reason, and what is no
    `UserError` is mostly the broken connection to a rank that is gone.
    """
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    try:
        code = main() or 0
    except Exception as error:
        if world_size > 1:
            time.sleep(SECONDS_TO_SPEAK_FIRST * ((rank != 0) + (not isinstance(error, UserError))))
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = EXIT_USER_ERROR
        else:
            traceback.print_exc()
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after a failure on one rank, the process group's destructor may wait for peers that are gone.
    os._exit(code) if code else sys.exit(0)
