"""What every launch script does around its work: parse, run, and say one thing when something is wrong."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import yaml

from dpo_scale.errors import EXIT_USER_ERROR, UserError
from dpo_scale.run import preemption
from dpo_scale.run.watchdog import Watchdog
from dpo_scale.settings.reader import list_sections, to_mapping
from dpo_scale.settings.tree import Config

SECONDS_TO_SPEAK_FIRST = 5.0
POLL_SECONDS = 0.2
MAX_KEPT = 2**16  # characters of the console


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser for `--config FILE section.key=value ...`; its help has a line for every option."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=_options_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; without one, the defaults and the overrides")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values are YAML")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    # the launchers of torch and DeepSpeed add this one; ranks are read from the environment
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def _options_help() -> str:
    """Every option with its default, meaning, type, unit and range, section by section."""
    lines = ["settings, in the file or as section.key=value, with their defaults:"]
    for name, summary, options in list_sections(Config):
        lines += ["", f"{name}: {summary}" if name else summary]
        lines += [f"  {key}={default}  # {meaning} ({expected})" for key, expected, default, meaning in options]
    return "\n".join(lines)


def print_config(config: Config) -> None:
    """What `--print-config` prints: the resolved tree as YAML."""
    yaml.safe_dump(to_mapping(config), sys.stdout, sort_keys=False)


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit; a `UserError` is one line and exit code 2, on whichever ranks it arose.

    From the start the process listens for notices that it should end (`dpo_scale.run.preemption`). A run that stopped
    for one exits with `EXIT_PREEMPTED`.
    """
    sys.stdout, sys.stderr = ForgivingStream(sys.stdout), ForgivingStream(sys.stderr)  # type: ignore
    preemption.listen()
    rank = int(os.environ.get("RANK", "0"))
    try:
        code = main() or 0
    except preemption.Preempted as stopped:
        if rank == 0:
            print(stopped, flush=True)
        code = preemption.EXIT_PREEMPTED
    except Exception as error:
        code = EXIT_USER_ERROR if isinstance(error, UserError) else 1
        _say(error, rank)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit. After a failure on one rank, the process group's destructor may wait for peers that are gone. After
    # success, threads of libraries sometimes abort the process (SIGABRT) while the interpreter shuts down.
    if code == 0:
        atexit._run_exitfuncs()
    os._exit(code)


class ForgivingStream:
    """A console that may fail (a log file on a full disk, a closed terminal) without ending the run.

    Text that could not be written is kept, up to `MAX_KEPT` characters, and written before the next one.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._kept = stream, ""

    def write(self, text: str) -> int:
        self._kept = (self._kept + text)[-MAX_KEPT:] if self._kept else text
        with suppress(OSError):
            self._stream.write(self._kept)
            self._kept = ""
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_broken_connection(error: Exception) -> bool:
    """Whether a collective failed because another rank does not answer; gloo has no class of its own for that."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _say(error: Exception, rank: int) -> None:
    """Print what went wrong, once for all ranks.

    A launcher ends all ranks as soon as one exits. So the rank that knows best speaks at once. The others wait, and are
    ended before they add to it. A rank other than 0 mostly fails for rank 0's reason. An error that is no `UserError`
    is mostly a broken connection to a rank that is gone. If that rank was killed and could say nothing itself, the
    watchdog says where it was and ends this rank.
    """
    is_users, watchdog = isinstance(error, UserError), Watchdog.current
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        told_before = preemption.was_noticed()
        seconds = SECONDS_TO_SPEAK_FIRST * ((rank != 0) + (not is_users))
        looks = watchdog.looks_elsewhere() if watchdog is not None and _is_broken_connection(error) else {}
        if watchdog is not None and looks:
            seconds = max(seconds, watchdog.seconds_to_look)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if watchdog is not None and not is_users:
                watchdog.end_with_others()
            if told_before:  # the launcher's notice came first, the broken connection after it
                time.sleep(POLL_SECONDS)
            elif preemption.wait_for_notice(POLL_SECONDS):
                return
        if watchdog is not None:
            watchdog.end_without_silent_machines(looks)
    if is_users:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        print(f"rank {rank}:", file=sys.stderr)
        traceback.print_exception(error)
