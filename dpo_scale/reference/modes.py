"""Where a run's reference values come from: a second model, the store, or the policy with its adapter off.

The reference is always the one that the config names, or the weights that the run started from (`model.path`); a
checkpoint never becomes a reference, so a resumed run and the store agree with the first start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dpo_scale.data.dataset import PairDataset
from dpo_scale.disk.cache import cache_folder
from dpo_scale.distributed import engine, ranks
from dpo_scale.distributed.folders import require_shared
from dpo_scale.errors import StoreError
from dpo_scale.models.layout_choice import LayoutChoice
from dpo_scale.models.load import ModelSource, load_reference, policy_source, reference_source
from dpo_scale.models.scorer import Policy, Scorer
from dpo_scale.reference.adapter import AdapterReference
from dpo_scale.reference.compute import fill, missing_rows, verify
from dpo_scale.reference.fingerprint import weights_fingerprint
from dpo_scale.reference.from_store import StoredReference
from dpo_scale.reference.live import LiveReference
from dpo_scale.reference.moving import MovingReference
from dpo_scale.reference.numerics import numerics_of
from dpo_scale.reference.protocol import KnownReference, NoReference, Reference
from dpo_scale.reference.store import Book, ReferenceStore
from dpo_scale.reference.store_manifest import BookKey
from dpo_scale.settings.tree import Config


def source_fingerprint(config: Config, source: ModelSource) -> str:
    """The fingerprint of the weights that a model is made of, found by rank 0. Every rank calls it.

    Raises:
        ModelError: on every rank, if they can't be fingerprinted.
    """

    code = config.model.trust_remote_code
    return ranks.on_main(
        lambda: weights_fingerprint(
            source.path, revision=source.revision, adapter=source.adapter, trust_remote_code=code
        )
    )


def open_book(config: Config) -> Book:
    """The part of the store that belongs to this config's reference and numerics. Every rank calls it.

    Raises:
        StoreError: if the store can't be used.
        ModelError: if the reference's weights can't be fingerprinted.
    """
    source = reference_source(config)
    fingerprint = source_fingerprint(config, source)
    folder = config.reference.store or str(cache_folder() / "reference_store")
    require_shared(Path(folder).expanduser(), "reference.store", may_be_read_only=True)
    described = {name: value for name, value in asdict(source).items() if value is not None}
    return ReferenceStore(folder).book(BookKey(fingerprint, numerics_of(config)), model=described)


def fill_for(
    config: Config, book: Book, datasets: Sequence[PairDataset], pad_token_id: int, choice: LayoutChoice
) -> int:
    """Compute what the book lacks of a config's data; the reference's engine is gone afterwards. Every rank calls it.

    Args:
        choice: of the run's layout, which the reference's check may change.

    Returns:
        The number of rows computed.
    """
    held: list[Scorer] = []

    def load() -> Scorer:
        held.append(load_reference(config, choice))
        return held[-1]

    computed = fill(
        book,
        datasets,
        load,
        pad_token_id=pad_token_id,
        max_tokens=config.reference.max_tokens_per_micro_batch,
        tokens=config.loss.ld_alpha is not None,
        seconds_per_shard=config.reference.seconds_per_shard,
    )
    while held:
        engine.release(held.pop())
    return computed


def stored_reference(
    config: Config, datasets: Sequence[PairDataset], pad_token_id: int, choice: LayoutChoice
) -> StoredReference:
    """The store as the run's reference, every row of the data sets in it; no reference model stays in memory.

    Args:
        choice: of the run's layout, which the reference's check may change if rows are missing.

    Raises:
        StoreError: with `reference.on_missing: error`, if rows are missing, saying how many and what computes them.
    """
    book = open_book(config)
    tokens = config.loss.ld_alpha is not None
    missing = missing_rows(book, datasets, tokens=tokens)
    count = sum(map(len, missing))
    if count and config.reference.on_missing == "error":
        first = next(data.describe(int(rows[0])) for data, rows in zip(datasets, missing, strict=True) if len(rows))
        raise StoreError(
            f"{book.folder}: {count} of {sum(map(len, datasets))} pairs have no stored reference log-probs for this "
            f"model and numerics, first {first}; compute them with launch/precompute.py and the same config, or set "
            "reference.on_missing=compute"
        )
    if count:
        ranks.log(f"reference store {book.folder}: {count} pairs are not there yet")
        fill_for(config, book, datasets, pad_token_id, choice)
    else:
        ranks.log(f"reference store {book.folder}: all {sum(map(len, datasets))} pairs are there")
    return StoredReference(book, config.loss.ld_alpha)


def make_reference(config: Config, policy: Policy, known: KnownReference | None, choice: LayoutChoice) -> Reference:
    """What the policy's log-ratios are taken against, by `reference.mode`.

    Args:
        known: the filled store in mode `store`, the data's columns in mode `columns`.
        choice: of the run's layout. If a reference that is loaded fails its check, the policy follows.
    """
    if not config.loss.needs_reference:
        return NoReference()
    if known is not None:
        return known
    settings, ld_alpha = config.reference, config.loss.ld_alpha
    if settings.mode == "adapter":
        return AdapterReference(policy, ld_alpha)
    scorer = load_reference(config, choice, beside=[policy])
    if settings.sync_steps is not None:
        return MovingReference(
            scorer, policy, mixup=settings.sync_mixup, sync_steps=settings.sync_steps, ld_alpha=ld_alpha
        )
    return LiveReference(scorer, ld_alpha)


def verify_start(
    config: Config,
    known: KnownReference,
    policy: Policy,
    dataset: PairDataset,
    pad_token_id: int,
    choice: LayoutChoice,
) -> None:
    """Let the policy, which is the reference before the first step, compute some known values again.

    Where the policy starts from elsewhere the reference itself is loaded for it, if `reference.verify_with_model`.
    """
    rows = config.reference.verify
    if rows == 0:
        return

    def check(scorer: Scorer) -> None:
        verify(known, scorer, dataset, rows, config.model.dtype, config.train.seed, pad_token_id)

    if policy_source(config) == reference_source(config):
        was_training = policy.module.training
        policy.eval()
        check(policy)
        policy.train(was_training)
    elif config.reference.verify_with_model:
        reference = load_reference(config, choice, beside=[policy])
        check(reference)
        engine.release(reference)
    else:
        ranks.log(
            "reference.verify: the policy does not start as the reference, so it cannot check stored rows; "
            "reference.verify_with_model=true loads the reference for it"
        )
