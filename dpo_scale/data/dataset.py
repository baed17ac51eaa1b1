"""The pairs of a run: every source tokenized, weighted, and split into training and held-out data.

A `PairDataset` is a list of indices into memory-mapped files, so weights, splits and selections move no tokens. Equal
settings give equal datasets on every rank without communication.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_scale.data.cache import TokenizedSource, tokenize_source
from dpo_scale.data.pair_file import PairFile
from dpo_scale.data.tokenize import PairTokenizer
from dpo_scale.disk.atomic import write_atomically
from dpo_scale.errors import DataError
from dpo_scale.settings.data import DataSettings, SourceSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BAD_ROWS_FILE = "bad_rows.jsonl"


@dataclass(frozen=True)
class Pair:
    """One tokenized pair.

    Attributes:
        prompt_ids: int32, at least one token.
        chosen_ids, rejected_ids: int32, the completions alone, with their end of turn unless cut.
        pair_key: 16 bytes, hash of the three (`dpo_scale.data.tokenize.pair_key`).
        index: of the pair in the dataset that it was read from.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    pair_key: bytes
    index: int


class PairDataset:
    """N pairs out of files of tokenized pairs.

    Attributes:
        lengths: int32 [N, 3], tokens of prompt, chosen and rejected.
    """

    def __init__(self, files: Sequence[PairFile], indices: np.ndarray | None = None):
        """`indices` [N] count through the files one after another; None takes every pair once."""
        self._files = list(files)
        self._starts = np.cumsum([0] + [len(file) for file in files])
        self._indices = np.arange(self._starts[-1]) if indices is None else np.asarray(indices, dtype=np.int64)
        self.lengths = np.concatenate([file.lengths for file in files])[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> Pair:
        file, row = self._locate(i)
        return Pair(*file.read(row), index=i)

    @cached_property
    def pair_keys(self) -> np.ndarray:
        """uint8 [N, 16]."""
        return np.concatenate([file.pair_keys() for file in self._files])[self._indices]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all pairs in order."""
        return hashlib.blake2b(self.pair_keys.tobytes(), digest_size=16).hexdigest()

    def describe(self, i: int) -> str:
        """Where pair i came from, as messages about rows say it: `train.jsonl row 17`."""
        file, row = self._locate(i)
        return file.describe(row)

    def select(self, indices: np.ndarray) -> PairDataset:
        """The pairs at `indices` (int [M]), in that order."""
        return PairDataset(self._files, self._indices[indices])

    def _locate(self, i: int) -> tuple[PairFile, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        position = int(self._indices[i])
        file = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._files[file], position - int(self._starts[file])


@dataclass(frozen=True)
class LoadedData:
    """What a run learns from and is measured on.

    Attributes:
        eval: None if nothing is held out.
        report: per split the sources with schema and counts, then the sizes of the splits and their overlap.
    """

    train: PairDataset
    eval: PairDataset | None
    report: dict[str, Any]


def load_pairs(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    log: Callable[[str], None],
    report_dir: Path | None = None,
) -> LoadedData:
    """Read, tokenize (or find tokenized), weight and split the data of a run. The same on every rank.

    Args:
        settings: the `data:` section; `train` names at least one source.
        tokenizer: of transformers, as `load_tokenizer` gives it.
        seed: chooses which pairs a fractional source weight takes.
        log: takes lines for the user.
        report_dir: folder that gets `bad_rows.jsonl` if rows were skipped.

    Raises:
        DataError: for anything wrong with the files or their rows, naming file and row.
        ConfigError: for a chat template that cannot be read.
    """
    assert settings.train, "DataSettings.train names no source"
    encoder = PairTokenizer(tokenizer, settings)
    train, train_weighted, report = _load_split("train", settings.train, settings, encoder, seed, log)
    held_out, sources = None, list(train)
    if settings.eval:
        eval_sources, eval_weighted, eval_report = _load_split("eval", settings.eval, settings, encoder, seed, log)
        held_out = PairDataset([source.pairs for source in eval_sources], eval_weighted)
        report |= eval_report
        sources += eval_sources
    files = [source.pairs for source in train]
    if settings.eval_fraction > 0:
        # the prompts whose hash, as a fraction of its range, is below eval_fraction
        hashes = np.concatenate([file.prompt_hashes for file in files])
        mask = hashes < np.uint64(int(settings.eval_fraction * 2**64))
        if not mask.any() or mask.all():
            part = "all" if mask.all() else "none"
            raise DataError(f"data.eval_fraction = {settings.eval_fraction}: holds out {part} of {len(mask)} pairs")
        held_out = PairDataset(files, np.flatnonzero(mask))
        train_weighted = train_weighted[~mask[train_weighted]]
        log(f"data.eval_fraction: {len(held_out)} of {len(mask)} pairs are held out, by their prompts")
    data = PairDataset(files, train_weighted)
    if len(data) == 0:
        raise DataError("data.train: the weights leave no pair to train on")
    report |= {"train_pairs": len(data), "eval_pairs": len(held_out) if held_out else 0}
    if held_out is not None:
        report["pairs_in_both"] = both = _count_shared(held_out.pair_keys, data.pair_keys)
        if both:
            log(f"WARNING: {both} of the {len(held_out)} held-out pairs are also trained on")
    bad_rows = [bad for source in sources for bad in source.bad_rows]
    if bad_rows and report_dir is not None:
        lines = (json.dumps(asdict(bad), ensure_ascii=False) + "\n" for bad in bad_rows)
        write_atomically(report_dir / BAD_ROWS_FILE, (line.encode() for line in lines))  # every rank writes the same
        log(f"{len(bad_rows)} bad rows skipped; they are listed in {report_dir / BAD_ROWS_FILE}")
    return LoadedData(data, held_out, report)


def _load_split(
    split: str,
    sources: list[SourceSettings],
    settings: DataSettings,
    encoder: PairTokenizer,
    seed: int,
    log: Callable[[str], None],
) -> tuple[list[TokenizedSource], np.ndarray, dict[str, Any]]:
    """A split's sources, the indices of their pairs as often as the weights say, and the report."""
    tokenized, indices, reports, start = [], [], [], 0
    for number, source in enumerate(sources):
        result = tokenize_source(source, settings, encoder, log)
        for line in _describe(source, result):
            log(line)
        tokenized.append(result)
        indices.append(start + _weighted(len(result.pairs), source.weight, seed, number))
        start += len(result.pairs)
        read_as = {"schema": result.schema, "columns": list(result.columns)}
        reports.append({"path": source.path, "weight": source.weight, **read_as, **result.counts})
    return tokenized, np.concatenate(indices), {split: reports}


def _describe(source: SourceSettings, result: TokenizedSource) -> list[str]:
    """What became of a source, for the log."""
    counts = result.counts
    how = "reusing tokenized pairs" if result.cached else f"tokenized in {result.seconds:.1f} s"
    weight = "" if source.weight == 1 else f", weight {source.weight:g}"
    columns = ", ".join(result.columns)
    lines = [f"{source.path}: {counts['rows']} rows, schema {result.schema} ({columns}){weight}; {how}"]
    what = {
        "prompt_cut": "prompts cut to data.max_prompt_length",
        "completion_cut": "pairs with a completion cut to data.max_length, so without its end",
        "overlong": "dropped as longer than data.max_length",
        "identical_after_cut": "dropped, as chosen equals rejected after cutting",
        "bad": "bad rows skipped",
    }
    changes = [f"{counts[name]} {meaning}" for name, meaning in what.items() if counts[name]]
    lines.append(f"{source.path}: {counts['kept']} pairs kept" + "".join(f"; {change}" for change in changes))
    if counts["multi_turn"]:
        lines.append(
            f"{source.path}: {counts['multi_turn']} pairs have user or tool messages within a completion; "
            "their tokens are scored as the assistant's are"
        )
    if counts["generation_prompt_differs"]:
        lines.append(
            f"{source.path}: in {counts['generation_prompt_differs']} pairs the chat template's generation "
            "prompt is not how the answer begins; the prompt ends where they part"
        )
    return lines


def _weighted(count: int, weight: float, seed: int, number: int) -> np.ndarray:
    """Indices [round(count * weight)], ascending: each pair floor(weight) times, a seeded part once more."""
    whole = int(weight)
    repeats = np.full(count, whole)
    rest = round((weight - whole) * count)
    repeats[np.random.default_rng([seed, number]).permutation(count)[:rest]] += 1
    return np.repeat(np.arange(count), repeats)


def _count_shared(keys: np.ndarray, others: np.ndarray) -> int:
    """How many of `keys` [N, 16] are among `others` [M, 16]."""
    halves, other_halves = (np.ascontiguousarray(x[:, :8]).view(np.uint64)[:, 0] for x in (keys, others))
    candidates = np.flatnonzero(np.isin(halves, other_halves))
    known = {key.tobytes() for key in others[np.isin(other_halves, halves)]}
    return sum(keys[i].tobytes() in known for i in candidates)
