"""What a process tells its watchdog: where it is, and that it works.

There are two counters, for two questions. `heartbeat` marks the places that every rank passes in the same order: the
ranks with the fewest beats are those that the others wait for. `note_activity` marks work that one rank may do while
the others wait for it, such as writing a checkpoint, exporting the model or compacting the reference store. It says
that something moves and nothing about who is behind. Both only count, so they may be called anywhere and often.

This module imports nothing of the package, so that the lowest layers can use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Progress(NamedTuple):
    """How far this process has come.

    Attributes:
        where: the place of the last beat.
        is_patient: whether no sign of progress is expected: before the first beat, and within `patience`.
    """

    beats: int
    activity: int
    where: str
    is_patient: bool


_beats = _activity = _patience = 0
_where = "start"


def heartbeat(where: str) -> None:
    """This rank has come to a place that all ranks pass in the same order."""
    global _beats, _where
    _where = where
    _beats += 1


def note_activity() -> None:
    """This rank works, whatever the other ranks do. Call it at least every few seconds of work."""
    global _activity
    _activity += 1


def noting_activity(items: Iterable[T]) -> Iterator[T]:
    """The items, each noted as activity when it is asked for."""
    for item in items:
        note_activity()
        yield item


@contextmanager
def patience(where: str) -> Iterator[None]:
    """Within it nothing counts as hanging, because a library works and does not say how far it is.

    For work that comes to an end by itself, such as loading weights, where collectives have their own time limit. A
    rank that dies is noticed all the same.
    """
    global _patience
    heartbeat(where)
    _patience += 1
    try:
        yield
    finally:
        _patience -= 1
        note_activity()


def progress() -> Progress:
    return Progress(_beats, _activity, _where, _beats == 0 or _patience > 0)
