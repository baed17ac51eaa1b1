"""Items made ahead of their use by a thread of their own, so that the device never waits for data.

A thread, not processes: what goes into a batch is NumPy and file reading, which mostly let go of the interpreter, it
shares the memory maps and the reference store of the process, and pinned memory needs no copy across processes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
# Micro-batches that wait for their turn on each rank: a megabyte or so each.
BATCHES_AHEAD = 8
SECONDS_TO_END = 10.0


class Ahead(Generic[T]):
    """An iterator over `items` in their order, run by a thread that keeps at most `depth` of them waiting.

    An error of `items` is raised, itself, where the item would have come. A context manager: leaving it, for whatever
    reason, ends the thread and closes the generator. The thread never keeps the process from ending.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        assert depth >= 1
        self._items, self._depth = items, depth
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = self._stopped = False  # no item follows; none is wanted any more
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="batches ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended or self._stopped)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(timeout=SECONDS_TO_END)  # it may hang in a file system; then it is left behind

    def _work(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._depth or self._stopped)
                    if self._stopped:
                        break
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as error:  # raised where it can be handled, even if it is no ordinary one
            self._error = error
        finally:
            if hasattr(self._items, "close"):
                self._items.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()
