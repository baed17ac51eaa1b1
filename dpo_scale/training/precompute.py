"""The flow of training, stopped after the scorer: data, the reference's engine, values into the store."""

from __future__ import annotations

from dpo_scale.distributed import ranks
from dpo_scale.errors import ConfigError
from dpo_scale.reference.modes import fill_for, open_book
from dpo_scale.settings.tree import Config
from dpo_scale.training.prepare import prepare, start


def precompute(config: Config) -> int:
    """Fill the store for the training and the held-out data of a config; every rank calls it.

    Returns:
        The number of rows computed, 0 if all were there.

    Raises:
        UserError: as training would, for config, data and model; StoreError if the store can't be used.
    """
    if not config.loss.needs_reference:
        raise ConfigError(
            f"loss.loss_type = {config.loss.loss_type!r}: uses no reference, so there is nothing to store"
        )
    start(config)
    prepared = prepare(config)
    data = prepared.data
    datasets = [data.train] if data.eval is None else [data.train, data.eval]
    book = open_book(config)
    computed = fill_for(config, book, datasets, prepared.pad_token_id, prepared.layout)
    pairs = sum(map(len, datasets))
    ranks.log(f"reference store {book.folder}: {computed} pairs computed, {pairs - computed} were there")
    return computed
