"""The flow of training, stopped after the scorer: data, the reference's engine, values into the store."""

from __future__ import annotations

from dpo_scale.data.dataset import load_pairs
from dpo_scale.distributed import engine, ranks
from dpo_scale.errors import ConfigError
from dpo_scale.models.load import check_liger, check_logprobs, check_vocabulary, load_tokenizers, resolve_layout
from dpo_scale.reference.modes import fill_for, open_book
from dpo_scale.settings.tree import Config


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
    ranks.init_distributed(config.deepspeed.timeout_minutes)
    ranks.quiet_libraries()
    engine.check_dtype(config.model.dtype)
    check_logprobs(config)
    check_liger(config)
    tokenizer, model_config = load_tokenizers(config)
    check_vocabulary(tokenizer, model_config)
    choice = resolve_layout(config)
    data = ranks.main_first(lambda: load_pairs(config.data, tokenizer, seed=config.train.seed, log=ranks.log))
    datasets = [data.train] if data.eval is None else [data.train, data.eval]
    book = open_book(config)
    computed = fill_for(config, book, datasets, tokenizer.pad_token_id, choice)
    pairs = sum(map(len, datasets))
    ranks.log(f"reference store {book.folder}: {computed} pairs computed, {pairs - computed} were there")
    return computed
