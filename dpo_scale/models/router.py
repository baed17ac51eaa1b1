"""How evenly a mixture of experts uses its experts: the balancing loss, and each expert's share of the tokens.

The loss is that of Switch Transformers (arXiv 2101.03961, equations 4 to 6) as transformers has it in
`load_balancing_loss_func`, taken of one completion at a time, prompt and completion together:

    loss = E * sum over experts e of F_e P_e

F_e: the share of the sequence's tokens that are routed to e, over all layers; it has no gradient, and the shares add up
to the experts a token is given. P_e: the mean of the router's probability of e over the same tokens and layers. A
pair's loss is the mean of its two completions', so neither layout nor micro-batches nor ranks change it, and a shared
prompt's tokens count for both completions.

It is computed in two steps, so that a row may lie on several ranks: `sum_over_runs` adds up the tokens at hand, run by
run, and `balance_of` makes of these sums what each sequence has. Sums are products with a membership matrix: float
atomics would add in another order each time.

Shapes: L layers with experts, E experts, R runs of tokens (`dpo_scale.data.layout.Runs`), P pairs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_scale.data.layout import Runs
from dpo_scale.distributed import ranks
from dpo_scale.distributed.sequence_parallel import SequenceGroup, sum_over
from dpo_scale.errors import ConfigError
from dpo_scale.models.zero3 import decoder_layers
from dpo_scale.settings.metric_names import ROUTER_AUX_LOSS
from dpo_scale.settings.tree import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHARES = "router/shares"  # [P, L, E] on the way to `share_metrics`
_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]  # of transformers' function; some have others


class RunSums(NamedTuple):
    """Sums over the tokens of each run, fp32.

    counts: [L, R, E] tokens that a layer routed to each expert.
    probabilities: [R, E] the router's probabilities, summed over layers too. They have the gradient.
    """

    counts: Tensor
    probabilities: Tensor


class Balance(NamedTuple):
    """How evenly the experts were used, pair by pair, fp32.

    loss: [P].
    shares: [P, L, E] share of the tokens that each expert was given, mean of the pair's completions; no gradient.
    """

    loss: Tensor
    shares: Tensor


@dataclass(frozen=True)
class Router:
    """The router of a mixture of experts.

    Attributes:
        layers: numbers of the decoder layers that have one.
        experts_per_token: how many experts a token is given.
    """

    layers: tuple[int, ...]
    experts_per_token: int

    def balance(
        self, logits: Sequence[Tensor], runs: Runs, group: SequenceGroup | None = None, *, differentiable: bool
    ) -> Balance:
        """The balance of a batch.

        Args:
            logits: the router's, [tokens, E] of each layer.
            group: of the ranks that share the row, if any do; the logits are then of this rank's part.
            differentiable: otherwise nothing is kept for a backward pass.
        """
        assert len(logits) == len(self.layers)
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            if group is None:
                return balance_of(sum_over_runs(logits, runs.lengths, self.experts_per_token), runs)
            start = len(logits[0]) * group.rank
            lengths = runs.lengths_in(start, start + len(logits[0]))
            own = sum_over_runs(logits, lengths, self.experts_per_token)
            return balance_of(RunSums(*(sum_over(group, values) for values in own)), runs)


def has_router(model_config: PreTrainedConfig) -> bool:
    """Whether a causal LM of this config has a router that transformers takes the balancing loss above of."""
    return bool(_router_classes(model_config))


def router_of(model: Any) -> Router | None:
    """The router of a transformers causal LM, without peft's wrapper; None if it has none."""
    classes = _router_classes(model.config)
    layers = enumerate(decoder_layers(model))
    routed = tuple(i for i, layer in layers if any(isinstance(module, classes) for module in layer.modules()))
    return Router(routed, model.config.get_text_config().num_experts_per_tok) if routed else None


def _router_classes(model_config: PreTrainedConfig) -> tuple[type, ...]:
    """The modules that give the logits; none if there is no router, or one with another balancing loss."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = model_config.get_text_config()
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    if model_class is None or not (getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)):
        return ()
    function = getattr(sys.modules[model_class.__module__], "load_balancing_loss_func", None)
    if function is None or list(inspect.signature(function).parameters) != _PARAMETERS:
        return ()
    recorded = (model_class._can_record_outputs or {}).get("router_logits", [])
    return tuple(each.target_class for each in (recorded if isinstance(recorded, list) else [recorded]))


def resolve_router_loss(config: Config, model_config: PreTrainedConfig) -> None:
    """Write what `loss.router_aux_loss_coef` comes to into the config. Before any weights are loaded.

    Raises:
        ConfigError: if it, or a metric of the router, is asked of a model without router.
    """
    given, text = config.loss.router_aux_loss_coef, model_config.get_text_config()
    if has_router(model_config):
        if given is None and getattr(text, "output_router_logits", False):
            given = text.router_aux_loss_coef
            ranks.log(f"balancing loss of the router: loss.router_aux_loss_coef = {given:g}, the model's own")
        config.loss.router_aux_loss_coef = float(given or 0.0)
        return
    lacks = f"a {model_config.model_type} model ({config.model.path}) has no router with a balancing loss"
    if given:
        raise ConfigError(f"loss.router_aux_loss_coef = {given!r}: {lacks}; leave it out")
    named: dict[str, list[str | None] | list[str]] = {
        "checkpoint.metric_for_best_model": [config.checkpoint.metric_for_best_model],
        "logging.console_metrics": config.logging.console_metrics,
    }
    for key, names in named.items():
        if ROUTER_AUX_LOSS in names:
            raise ConfigError(f"{key} = {ROUTER_AUX_LOSS!r}: {lacks}; leave it out")


def sum_over_runs(logits: Sequence[Tensor], lengths: Sequence[int], experts_per_token: int) -> RunSums:
    """Add up the tokens at hand, run by run.

    Args:
        logits: the router's, [tokens, E] of each of L layers, as they come; the softmax is taken in fp32.
        lengths: tokens of each run, in the order of the tokens; a run may be empty here.
        experts_per_token: how many experts a token is given, those of the largest logits.
    """
    assert sum(lengths) == logits[0].shape[0]
    members = logits[0].new_zeros(len(lengths), logits[0].shape[0], dtype=torch.float32)
    end = 0
    for run, length in enumerate(lengths):  # filled in on the device: a copy from the host might be waited for
        members[run, end : end + length] = 1.0
        end += length
    counts, probabilities = [], torch.zeros((), device=members.device)
    for of_layer in logits:
        chances = torch.softmax(of_layer, dim=-1, dtype=torch.float32)
        given_to = chances.detach().topk(experts_per_token, dim=-1).indices
        counts.append(members @ torch.zeros_like(chances).scatter_(1, given_to, 1.0))
        probabilities = probabilities + members @ chances
    return RunSums(torch.stack(counts), probabilities)


def balance_of(sums: RunSums, runs: Runs) -> Balance:
    """What each pair has, out of the sums over whole runs."""
    layers, _, experts = sums.counts.shape
    mean = sums.counts.new_zeros(len(runs.sequences), len(runs.lengths))  # times sums: means over a sequence's tokens
    for row, parts in enumerate(runs.sequences):
        tokens = sum(runs.lengths[run] for run in parts)
        for run in parts:
            mean[row, run] = 1.0 / tokens
    shares = torch.einsum("sr,lre->sle", mean, sums.counts)
    losses = experts * (shares.mean(dim=1) * (mean @ sums.probabilities) / layers).sum(dim=-1)
    return Balance(losses.view(-1, 2).mean(dim=1), shares.view(-1, 2, layers, experts).mean(dim=1))


def share_metrics(means: dict[str, Any], router: Router | None) -> dict[str, float]:
    """Metrics as they are recorded: of the mean shares [L, E] in `means` three numbers a layer.

    A share is the part of the tokens that an expert was given, so the shares of a layer add up to the experts per
    token. The entropy, in nats, is of the shares divided by that; log E where all experts are used alike.
    """
    if router is None:
        return means
    metrics = {name: value for name, value in means.items() if name != SHARES}
    for layer, shares in zip(router.layers, means[SHARES], strict=True):
        metrics[f"router/largest_share/layer_{layer}"] = float(shares.max())
        metrics[f"router/smallest_share/layer_{layer}"] = float(shares.min())
        used = shares[shares > 0] / shares.sum()
        metrics[f"router/entropy/layer_{layer}"] = float(-(used * np.log(used)).sum())
    return metrics
