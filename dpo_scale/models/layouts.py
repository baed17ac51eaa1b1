"""Which layout and which attention a run takes, why, and the proof that they give the model's own log-probs.

Rows of many sequences need a model whose attention can be replaced and that mixes tokens nowhere else. What
transformers says of its classes decides that before any weights are read; a few random pairs through the loaded
model, laid out both ways, then show whether it is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from dpo_scale import engine
from dpo_scale.config import Config
from dpo_scale.data.dataset import Pair
from dpo_scale.data.layout import Layout, make_batch
from dpo_scale.errors import ConfigError, ModelError
from dpo_scale.models.attention import use_attention

# Mean difference per token that another order of the same sums may cause on random tokens, which models find far
# less likely than text. Deep models in 16 bits may come to more; so several times what padding alone changes is allowed
# too, up to a limit: sequences that see each other differ by tenths and more.
_ALLOWED_PER_TOKEN = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
_TIMES_PADDING, _MOST_ALLOWED = 4.0, 0.3

_ATTENTION = {
    "blocks": "scaled_dot_product_attention, sequence by sequence",
    "flex": "FlexAttention with a block mask",
    "varlen": "flash-attention's variable-length kernel",
}


# Architectures whose layers keep a plan or a window from their attention, though transformers lists it as replaceable:
# found by running each architecture of transformers 5.23 at a tiny size. `check_layout` is there for the next ones.
_KEEP_TO_THEMSELVES = {"doge", "moshi", "nemotron", "phimoe"}


def choose_layout(config: Config, model_configs: Sequence[Any]) -> tuple[Layout, str]:
    """The layout that `data.layout` comes to, and the reason, in words for the log.

    Args:
        model_configs: the transformers configs of the models that will run.

    Raises:
        ConfigError: if a layout was asked for by name that a model or its attention cannot take.
    """
    asked = config.data.layout
    if asked == "padded":
        return "padded", "asked for by name"
    backend, reason = choose_attention(config)
    if backend is None:
        against = [reason]
    else:
        against = [why for model_config in model_configs if (why := why_padded(model_config)) is not None]
    if against and asked != "auto":
        raise ConfigError(f"data.layout = {asked!r}: {against[0]}; expected 'padded' or 'auto' for this run")
    if against:
        return "padded", against[0]
    layout: Layout = "shared_prefix" if asked == "auto" else asked
    prompts = "each prompt once, " if layout == "shared_prefix" else ""
    return layout, f"{prompts}no padding; attention by {_ATTENTION[str(backend)]} ({reason})"


def choose_attention(config: Config) -> tuple[str | None, str]:
    """The back end of `dpo_scale.models.attention` for rows of many sequences, and the reason.

    `model.attn_implementation` is taken at its word: sdpa, flex_attention and flash_attention_2 name the back end that
    is made of them; for any other there is None.
    """
    asked, device = config.model.attn_implementation, engine.device().type
    has_flash = find_spec("flash_attn") is not None
    if asked is None:
        if device != "cuda":
            return "blocks", f"the one for a {device} device"
        if has_flash and config.model.dtype != "float32":
            return "varlen", "flash_attn is installed"
        return "flex", f"for {config.model.dtype}" if has_flash else "flash_attn is not installed"
    if asked == "sdpa":
        return "blocks", "model.attn_implementation = 'sdpa'"
    if asked == "flex_attention":
        if device == "cuda":
            return "flex", "model.attn_implementation = 'flex_attention'"
        return None, f"model.attn_implementation = 'flex_attention' does not train on a {device} device"
    if asked == "flash_attention_2":
        if has_flash and device == "cuda":
            return "varlen", "model.attn_implementation = 'flash_attention_2'"
        return None, "model.attn_implementation = 'flash_attention_2' needs a CUDA device and the package flash_attn"
    return None, f"model.attn_implementation = {asked!r} takes one sequence a row"


def _attention_of(config: Config) -> str:
    backend, reason = choose_attention(config)
    if backend is None:
        raise ConfigError(f"data.layout = {config.data.layout!r}: {reason}; expected 'padded' or 'auto' for this run")
    return backend


def why_padded(model_config: Any) -> str | None:
    """Why a model can only take one sequence a row; None if it can take many."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = getattr(model_config, "model_type", type(model_config).__name__)
    if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(model_config, "auto_map", None):
        return f"a {kind} model's code is not transformers' own, so nothing is known of its attention"
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
    model_class = found[0] if isinstance(found, tuple) else found
    text = model_config.get_text_config()
    other = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        return f"a {kind} model has layers of {sorted(other)[0]}, whose sequences no mask here keeps apart"
    if getattr(model_class, "_is_stateful", False):
        return f"a {kind} model has layers with a state, which runs through a whole row"
    if not getattr(model_class, "_supports_attention_backend", False):
        return f"a {kind} model's attention cannot be replaced in transformers"
    if kind in _KEEP_TO_THEMSELVES:
        return f"a {kind} model does not hand its attention what rows of many sequences need"
    return None


def install_attention(model: Any, config: Config) -> None:
    """Give a loaded transformers model the attention of the run's layout; what it had is kept for `check_layout`."""
    model.own_attention = model.config._attn_implementation
    if config.data.layout != "padded":
        use_attention(model, _attention_of(config))


@torch.no_grad()
def check_layout(scorer: Any, model: Any, config: Config) -> None:
    """Make sure that the run's layout gives a model the log-probs that separate sequences have. Every rank calls it.

    Args:
        scorer: an engine around a `PairScorer`, at any stage.
        model: the transformers model inside it.

    Raises:
        ModelError: if it does not, with the difference.
    """
    layout, dtype = config.data.layout, config.model.dtype
    if layout == "padded":
        return
    pairs = _random_pairs(model.config.get_text_config().vocab_size)
    weights = np.ones(len(pairs), dtype=np.float32)
    was_training = scorer.module.training
    scorer.eval()
    model.set_attn_implementation(model.own_attention)
    expected = scorer(**make_batch("padded", pairs, weights, 0).to(engine.device()).scorer_inputs)
    alone = [make_batch("padded", [pair], weights[:1], 0).to(engine.device()) for pair in pairs]
    by_padding = (torch.cat([scorer(**batch.scorer_inputs) for batch in alone]) - expected).abs().mean().item()
    use_attention(model, _attention_of(config))
    got = scorer(**make_batch(layout, pairs, weights, 0).to(engine.device()).scorer_inputs)
    scorer.train(was_training)
    difference = (got - expected).abs().mean().item()
    if not difference <= max(_ALLOWED_PER_TOKEN[dtype], min(_TIMES_PADDING * by_padding, _MOST_ALLOWED)):
        raise ModelError(
            f"{type(model).__name__}: data.layout = {layout!r} does not give it the log-probs of separate sequences "
            f"({difference:.3g} a token apart on average); set data.layout=padded"
        )


def _random_pairs(vocabulary: int) -> list[Pair]:
    """Two pairs of random tokens, the same on every rank."""
    draw = np.random.default_rng(0)
    sizes = [(9, 7, 5), (1, 4, 8)]
    return [Pair(*(draw.integers(0, vocabulary, n) for n in of_pair), b"", i) for i, of_pair in enumerate(sizes)]
