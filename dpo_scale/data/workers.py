"""Chunks of rows to tokenized pairs, in this process or in many.

The result is the same in both: a chunk's outcome is a pure function of its rows, and outcomes come back in the order of
the chunks. A bounded number of chunks is under way, so memory does not grow with the data.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from dpo_scale.data.pair_file import record_batch
from dpo_scale.data.schemas import Columns, to_preference
from dpo_scale.data.sources import DataFile, Record, RowProblem, parse_record
from dpo_scale.data.tokenize import Dropped, PairTokenizer
from dpo_scale.errors import DataError

CHUNK_ROWS = 256  # rows a worker gets at a time
SERIAL_ROWS = 4096  # fewer rows than this are done before a worker process has started
MAX_PROCESSES = 32
_FLAGS = ("prompt_cut", "completion_cut", "generation_prompt_differs")  # of a pair, counted over all that are kept


@dataclass(frozen=True)
class Chunk:
    """Neighbouring rows of one file of a source."""

    file: int
    records: list[Record]


@dataclass(frozen=True)
class ChunkResult:
    """What became of a chunk's rows; `counts` as in `dpo_scale.data.cache.TokenizedSource`."""

    file: int
    batch: Any  # pa.RecordBatch of the pairs that are kept
    bad: list[tuple[int, str]]  # (row, reason)
    counts: Counter[str]


@dataclass(frozen=True)
class RowTokenizer:
    """From records to tokenized pairs; a pure function of the chunk, in whichever process."""

    tokenizer: PairTokenizer
    columns: Columns

    def __call__(self, chunk: Chunk) -> ChunkResult:
        counts: Counter[str] = Counter(rows=len(chunk.records))
        bad, rows, preferences = [], [], []
        for row, content in chunk.records:
            try:
                preferences.append(to_preference(parse_record(content), self.columns, chat=self.tokenizer.chat))
                rows.append(row)
            except RowProblem as problem:
                bad.append((row, str(problem)))
        pairs, hashes, kept_rows = [], [], []
        for row, preference, outcome in zip(rows, preferences, self.tokenizer.tokenize(preferences), strict=True):
            if isinstance(outcome, RowProblem):
                bad.append((row, str(outcome)))
            elif isinstance(outcome, Dropped):
                counts[outcome.reason] += 1
            else:
                pairs.append(outcome)
                hashes.append(preference.prompt_hash)
                kept_rows.append(row)
                counts.update({name: int(getattr(outcome, name)) for name in _FLAGS}, multi_turn=preference.multi_turn)
        counts.update(kept=len(pairs), bad=len(bad))
        return ChunkResult(chunk.file, record_batch(pairs, hashes, chunk.file, kept_rows), sorted(bad), counts)


def read_chunks(files: list[DataFile]) -> Iterator[Chunk]:
    for index, file in enumerate(files):
        records = file.records()
        while chunk := list(islice(records, CHUNK_ROWS)):
            yield Chunk(index, chunk)


def run_chunks(chunks: Iterable[Chunk], worker: RowTokenizer, num_proc: int | None) -> Iterator[ChunkResult]:
    """Results in the order of the chunks, from as many processes as the data deserves."""
    chunks = iter(chunks)
    if num_proc is None:
        first = list(islice(chunks, SERIAL_ROWS // CHUNK_ROWS))
        small = len(first) < SERIAL_ROWS // CHUNK_ROWS
        num_proc = 1 if small else min(_cores(), MAX_PROCESSES)
        chunks = chain(first, chunks)
    if num_proc == 1:
        yield from map(worker, chunks)
        return
    # spawned, not forked: CUDA and the tokenizer library's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start_process, initargs=(worker,))
    pending: deque[Any] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_run_in_process, chunk))
            if len(pending) > 2 * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"a tokenizing process died, perhaps out of memory; set data.num_proc below {num_proc}"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker_of_process: RowTokenizer | None = None


def _start_process(worker: RowTokenizer) -> None:
    global _worker_of_process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_of_process = worker


def _run_in_process(chunk: Chunk) -> ChunkResult:
    assert _worker_of_process is not None
    return _worker_of_process(chunk)
