"""What every launch script does around its work: parse, run, and say one thing when something is wrong."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable

from dpo_scale.config import Config
from dpo_scale.config_reader import list_keys
from dpo_scale.errors import UserError

EXIT_USER_ERROR = 2
SECONDS_FOR_RANK_0_TO_SPEAK = 10.0


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


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit; a `UserError` is one line from rank 0 and exit code 2, on whichever rank it arose.

    A launcher ends all ranks as soon as one exits. So a rank other than 0 waits a moment before it speaks: mostly it
    has failed for rank 0's reason, or because rank 0 is gone, and is ended before it adds its own traceback.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        code = main() or 0
    except Exception as error:
        if rank != 0:
            time.sleep(SECONDS_FOR_RANK_0_TO_SPEAK)
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
