"""Which layout, attention and groups a run takes, why, and what it takes instead if a model fails their check.

Rows of many sequences need a model whose attention can be replaced and that mixes tokens nowhere else. What
transformers says of its classes decides that before any weights are read. `layout_check` then tests the loaded model.
What the config names is kept: if it fails its check, the run ends. What the config leaves open may change: to another
attention first, to the layout `padded` last, for all models of the run alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpo_scale.data.groups import Groups
from dpo_scale.data.layout import Layout
from dpo_scale.distributed import ranks
from dpo_scale.errors import ConfigError, ModelError
from dpo_scale.models.attention_backends import BACKENDS, use_attention
from dpo_scale.models.layout_check import check_layout
from dpo_scale.models.scorer import causal_lm
from dpo_scale.settings.tree import Config

# Architectures whose layers do not hand a plan or a window to their attention, though transformers lists it as
# replaceable. Found by running each architecture of transformers 5.23 at a tiny size; `check_layout` finds the next.
_KEEP_TO_THEMSELVES = {"doge", "moshi", "nemotron", "phimoe"}


@dataclass(frozen=True)
class LayoutOption:
    """A layout, the back end (`BACKENDS`) that keeps its sequences apart (None: the model's own), and why."""

    layout: Layout
    backend: str | None
    reason: str

    def describe(self) -> str:
        """For the log."""
        if self.backend is None:
            return f"layout {self.layout}: {self.reason}"
        prompts = "each prompt once, " if self.layout == "shared_prefix" else ""
        return f"layout {self.layout}: {prompts}no padding; attention by {BACKENDS[self.backend].title} ({self.reason})"


class LayoutChoice:
    """The layout and attention of all models of a run, and what comes next if a model fails their check.

    Attributes:
        groups: of ranks that may share a row; none if the layout is `padded`.
    """

    def __init__(self, config: Config, options: Sequence[LayoutOption], groups: Groups | None = None) -> None:
        """Args: options: at least one, best first."""
        self._config, self._options = config, list(options)
        self.groups = groups or Groups(ranks.world_size())
        config.data.layout = self.option.layout

    @property
    def option(self) -> LayoutOption:
        """What is taken now. `config.data.layout` names its layout."""
        return self._options[0]

    def give_up(self, model: str, failure: str) -> None:
        """Go on to the next option.

        Raises:
            ModelError: if there is none, because what failed was asked for by name.
        """
        failed = self._options[0]
        assert failed.backend is not None
        tried = f"data.layout = {failed.layout!r} with attention by {BACKENDS[failed.backend].title} fails its check"
        if len(self._options) == 1:
            raise ModelError(f"{model}: {tried}: {failure}; set data.layout=padded")
        del self._options[0]
        self._config.data.layout = self.option.layout
        ranks.log(f"{model}: {tried}: {failure}")
        ranks.log(self.option.describe())


def choose_layout(config: Config, model_configs: Sequence[Any]) -> LayoutChoice:
    """What `data.layout` and `model.attn_implementation` come to, and the reason.

    Args:
        config: its `data.layout` becomes what is taken.
        model_configs: the transformers configs of the models that will run.

    Raises:
        ConfigError: if the config names a layout that a model or its attention cannot take, or an attention that the
            layout has no use for.
    """
    asked = config.data.layout
    if asked == "padded":
        return _padded(config, "asked for by name")
    attention = ranks.from_main(attention_options(config))  # what another rank lacks fails the check on all
    backend, reason = attention[0]
    against = [reason] if backend is None else [why for c in model_configs if (why := why_padded(c)) is not None]
    if against and config.train.sequence_parallel_size != 1:
        raise ConfigError(
            f"train.sequence_parallel_size = {config.train.sequence_parallel_size!r}: {against[0]}; expected 1 for "
            "this run, whose rows hold one sequence each"
        )
    if against and asked != "auto":
        raise ConfigError(f"data.layout = {asked!r}: {against[0]}; expected 'padded' or 'auto' for this run")
    if against:
        return _padded(config, against[0])
    groups = choose_groups(config, model_configs, ranks.world_size())
    layout: Layout = "shared_prefix" if asked == "auto" else asked
    options = [LayoutOption(layout, backend, reason) for backend, reason in attention]
    if asked == "auto" and config.model.attn_implementation is None and groups.largest == 1:
        options.append(LayoutOption("padded", None, "no attention for rows of many sequences passed its check"))
    return LayoutChoice(config, options, groups)


def choose_groups(config: Config, model_configs: Sequence[Any], world_size: int) -> Groups:
    """The groups of ranks that `train.sequence_parallel_size` comes to.

    Raises:
        ConfigError: if the ranks or the models' heads cannot be divided so, or a model needs whole rows.
    """
    asked = config.train.sequence_parallel_size
    if asked == 1:
        return Groups(world_size)
    said = f"train.sequence_parallel_size = {asked!r}"
    for model_config in model_configs:
        if (why := why_whole_rows(model_config)) is not None:
            raise ConfigError(f"{said}: {why}; expected 1 for this run")
    heads = min(c.get_text_config().num_attention_heads for c in model_configs)
    if asked == "auto":
        powers = itertools.takewhile(lambda n: world_size % n == 0 and n <= heads, (2**k for k in itertools.count()))
        return Groups(world_size, tuple(powers))
    if world_size % asked:
        raise ConfigError(f"{said}: expected a divisor of the number of ranks, which is {world_size} here")
    if asked > heads:
        raise ConfigError(f"{said}: expected at most {heads}, the model's attention heads, of which each rank has some")
    return Groups(world_size, (asked,))


def why_whole_rows(model_config: Any) -> str | None:
    """Why a model's row cannot be split over ranks, though its attention can be replaced; None if it can.

    Rotary embeddings of some kinds are scaled by the longest position in the row, of which a rank has a part only.
    """
    text = model_config.get_text_config()
    stated = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = {name: of for name, of in stated.items() if isinstance(of, dict)} or {"": stated}  # some by kind of layer
    for of in kinds.values():
        if (kind := of.get("rope_type", of.get("type"))) in ("dynamic", "longrope"):
            return f"a {model_config.model_type} model with {kind} positions scales them by the length of the whole row"
    return None


def _padded(config: Config, reason: str) -> LayoutChoice:
    """Padded rows, which run with attention of transformers."""
    asked = config.model.attn_implementation
    if not transformers_has(asked):
        raise ConfigError(
            f"model.attn_implementation = {asked!r}: is for rows of many sequences only, and data.layout is 'padded' "
            f"here ({reason}); expected an attention of transformers, such as 'sdpa', or null"
        )
    return LayoutChoice(config, [LayoutOption("padded", None, reason)])


def attention_options(config: Config) -> list[tuple[str | None, str]]:
    """The back ends for rows of many sequences that a run can have, best first, each with the reason.

    `model.attn_implementation` is taken at its word. Where it names no back end, or one that does not run here, there
    is only None.
    """
    asked, device = config.model.attn_implementation, ranks.device().type
    if asked is not None:
        named = f"model.attn_implementation = {asked!r}"
        backend = next((name for name, row in BACKENDS.items() if row.setting == asked), None)
        if backend is None:
            return [(None, f"{named} takes one sequence a row")]
        missing = BACKENDS[backend].why_not(device)
        return [(backend, named) if missing is None else (None, f"{named}: {missing}")]
    options: list[tuple[str | None, str]] = []
    refused: dict[str, None] = {}  # a set in order
    for name, row in BACKENDS.items():
        if row.devices is None or device not in row.devices:
            continue
        why_not = row.why_not(device, getattr(torch, config.model.dtype))
        if why_not is None:
            options.append((name, "; ".join(refused) or f"the fastest for a {device} device"))
        else:
            refused[why_not] = None
    return options or [(name, f"the one for a {device} device") for name, row in BACKENDS.items() if not row.devices]


def transformers_has(asked: str | None) -> bool:
    """Whether `model.attn_implementation` is for transformers too, and not for rows of many sequences only."""
    return not any(row.setting == asked and not row.in_transformers for row in BACKENDS.values())


def why_padded(model_config: Any) -> str | None:
    """Why a model can only take one sequence a row; None if it can take many."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = getattr(model_config, "model_type", type(model_config).__name__)
    if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(model_config, "auto_map", None):
        return f"a {kind} model's code is not transformers' own, and its attention is not known"
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


def install_attention(model: Any, option: LayoutOption) -> None:
    """Give a loaded transformers model the attention of an option. What it had is kept as `own_attention`."""
    if not hasattr(model, "own_attention"):
        model.own_attention = model.config._attn_implementation
    if option.backend is not None:
        use_attention(model, option.backend)
    elif model.config._attn_implementation != model.own_attention:
        model.set_attn_implementation(model.own_attention)


def prove_layout(choice: LayoutChoice, scorer: Any, dtype: str, beside: Sequence[Any] = ()) -> None:
    """Make sure that a layout gives a model the log-probs of separate sequences. Every rank calls it.

    If it does not, all models of the run go on to the next option.

    Args:
        scorer: an engine around a `PairScorer`, at any stage, with the choice's attention installed.
        dtype: of the models.
        beside: engines of the run's other models, which the choice was proved for.

    Raises:
        ModelError: saying what failed, if that was asked for by name.
    """
    unproved = [scorer]
    while unproved:
        model, option = causal_lm(unproved[-1].module.model), choice.option
        failure = None
        if option.backend is not None:
            failure = check_layout(unproved[-1], model, option.layout, option.backend, dtype)
        if failure is None:
            unproved.pop()
            continue
        choice.give_up(type(model).__name__, failure)
        unproved = [scorer, *beside]
        for each in unproved:
            each.module.layout = choice.option.layout
            install_attention(causal_lm(each.module.model), choice.option)
