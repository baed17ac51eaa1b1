"""Token log-probs out of a causal language model, without its logits ever being a tensor of the graph.

A Hugging Face causal LM is a backbone and a head. Its own `forward` multiplies every position by the head; only
completion tokens are scored in preference tuning, so `PairScorer` runs the backbone, picks the hidden states that
predict a completion token, and hands those to the head. The head's own `forward` is rebound to return log-probs: the
head stays the module that owns its weight, so ZeRO-3 gathers that weight by the hooks it has anyway, in forward and
backward, once per pass, tied or not.

A row may be computed by a group of ranks together (`distributed.sequence_parallel`). Each runs the backbone on its own
tokens; the hidden states to score are dealt evenly over the group first, and what comes of them is gathered.

Shapes: B rows of T tokens, S scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from dpo_scale.data.batching import MicroBatch
from dpo_scale.data.dataset import PairDataset
from dpo_scale.data.groups import Groups
from dpo_scale.data.layout import Layout, PairBatch, Runs, Segment, Share, make_batch
from dpo_scale.distributed import ranks, sequence_parallel
from dpo_scale.distributed.sequence_parallel import SequenceGroup, exchange, gather_dealt, sum_over
from dpo_scale.errors import ModelError
from dpo_scale.logprobs import token_logps
from dpo_scale.logprobs.pair_loss import PairLoss, fused_pair_loss
from dpo_scale.models.attention import AttentionPlan
from dpo_scale.models.router import router_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class HeadTransform:
    """What a model does to `hidden @ W.T + bias`: multiply by `logit_scale`, then soft-cap at `softcap`."""

    logit_scale: float = 1.0
    softcap: float | None = None


def head_transform(config: Any) -> HeadTransform:
    """Read logit scale and soft-cap off a transformers config.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma-2 caps at
    `final_logit_softcapping`.
    """
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    if getattr(text, "model_type", "").startswith("granite"):
        scale /= float(getattr(text, "logits_scaling", 1.0))
    cap = getattr(text, "final_logit_softcapping", None)
    return HeadTransform(scale, float(cap) if cap else None)


def causal_lm(model: Any) -> Any:
    """The transformers model itself, out of a peft model too; adapters are inside its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_and_head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The two parts of a causal LM, with or without an adapter.

    Raises:
        ModelError: if the model has no separable backbone and linear head.
    """
    whole = causal_lm(model)
    backbone, head = whole.base_model, whole.get_output_embeddings()
    if backbone is whole or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(whole).__name__}: expected a causal language model made of a backbone and a linear head"
        )
    return backbone, head


class PairScorer(nn.Module):
    """A causal LM as a function from token ids to the log-probs of chosen positions.

    Args:
        model: a transformers causal LM, or a peft model around one; its head is rebound, so `model(...)` no longer
            returns logits.
        implementation: how log-probs are computed (`dpo_scale.logprobs`).
        layout, groups: of the batches that it is meant to be given, for whoever makes them.

    Attributes:
        router: of a mixture of experts, otherwise None.

    Raises:
        ModelError: if the model has no separable backbone and linear head.
    """

    def __init__(
        self,
        model: nn.Module,
        implementation: str = "auto",
        layout: Layout = "padded",
        groups: Groups | None = None,
    ) -> None:
        super().__init__()
        _, head = backbone_and_head(model)
        self.model, self.layout = model, layout
        self.groups = groups or Groups(ranks.world_size())
        self.router = router_of(causal_lm(model))
        transform = head_transform(causal_lm(model).config)

        def score(linear, hidden, targets, by_products, pair_loss):  # typed by `forward`
            logits = {"bias": linear.bias, "logit_scale": transform.logit_scale, "softcap": transform.softcap}
            if pair_loss is not None:
                return fused_pair_loss(hidden, linear.weight, targets, pair_loss, **logits)
            how = {"implementation": implementation, "by_products": by_products}
            return token_logps(hidden, linear.weight, targets, **logits, **how)

        head.forward = types.MethodType(score, head)  # type: ignore[method-assign]

    def forward(
        self,
        input_ids: torch.Tensor,
        score_index: torch.Tensor,
        score_targets: torch.Tensor,
        by_products: tuple[str, ...] = (),
        pair_loss: PairLoss | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        branch_ids: torch.Tensor | None = None,
        segments: tuple[Segment, ...] | None = None,
        share: Share | None = None,
        router_runs: Runs | None = None,
        router_gradient: bool = False,
    ) -> Any:
        """Log-probs of `score_targets`, fp32 [S]; with `pair_loss` the loss and [P, 2] sums (`fused_pair_loss`).

        With `by_products` these come beside the log-probs, by name. With `router_runs` all this is the first of two;
        the second is the `Balance` of the experts.

        Args:
            input_ids: [B, T] int64. Without `segments` padded on the right: under a causal mask no real token sees
                the padding, so no attention mask is needed.
            score_index: [S] int64, flat positions (b * T + t) whose hidden state predicts a scored token.
            score_targets: [S] int64, those tokens.
            by_products: extra per-token values, see `dpo_scale.logprobs.token_logps`.
            pair_loss: how the log-probs of each pair become its loss, to be done here with its gradient.
            position_ids, document_ids, branch_ids, segments: a row of many sequences, as in `PairBatch`; the model's
                attention must be one of `dpo_scale.models.attention`.
            share: of a row that a group of ranks computes together. The result is that of the whole row on each.
            router_runs: the rows' runs, where the balance of the experts is asked for.
            router_gradient: whether that balance is to be differentiated.
        """
        backbone, head = backbone_and_head(self.model)
        group = None if share is None else sequence_parallel.group_of(share.size)
        row: dict[str, Any] = {}
        if segments is not None:
            assert position_ids is not None and document_ids is not None and branch_ids is not None
            plan = AttentionPlan(position_ids, document_ids, branch_ids, segments, group)
            row = {"position_ids": position_ids, "attention_plan": plan}
        if share is not None:
            input_ids, row["position_ids"] = share.part_of(input_ids), share.part_of(row["position_ids"])
        if self.router is not None:  # said either way, because the model's config may ask for it in every pass
            row["output_router_logits"] = router_runs is not None
        with one_sequence_a_row() if segments is None else nullcontext():
            output = backbone(input_ids=input_ids, use_cache=False, **row)
        hidden, balance = output.last_hidden_state.flatten(0, 1), None
        if router_runs is not None:
            assert self.router is not None
            balance = self.router.balance(output.router_logits, router_runs, group, differentiable=router_gradient)
        del output  # the router's logits of all layers, before the head needs room
        if share is None or group is None:
            found = head(hidden.index_select(0, score_index), score_targets, by_products, pair_loss)
        else:
            found = _score_dealt(head, hidden, score_targets, by_products, pair_loss, share, group)
        return found if router_runs is None else (found, balance)


def _score_dealt(
    head: nn.Module,
    hidden: torch.Tensor,
    score_targets: torch.Tensor,
    by_products: tuple[str, ...],
    pair_loss: PairLoss | None,
    share: Share,
    group: SequenceGroup,
) -> Any:
    """What the head makes of a row's scored tokens, dealt evenly over the ranks that share it; the whole on each.

    Args:
        hidden: [t, H] of this rank's part of the row.
        score_targets: [S] of the whole row, as the tensors of `pair_loss`.
    """
    arrived = exchange(hidden.index_select(0, share.sent_index), group, share.sent, share.received)
    scored, targets = arrived.index_select(0, share.order), share.dealt(score_targets)
    if pair_loss is not None:
        return head(scored, targets, (), pair_loss.dealt(share.size, share.rank, partial(sum_over, group)))
    found = head(scored, targets, by_products, None)
    logps, extra = found if by_products else (found, {})
    logps = gather_dealt(logps, len(score_targets), group)
    extra = {name: gather_dealt(values, len(score_targets), group) for name, values in extra.items()}
    return (logps, extra) if by_products else logps


class Scorer(Protocol):
    """What runs a `PairScorer`: a DeepSpeed engine around it, called as it is. At stage 3 every rank calls together."""

    @property
    def module(self) -> PairScorer: ...

    def __call__(self, *inputs: Any, **named: Any) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def zero_optimization_stage(self) -> int: ...


class Policy(Scorer, Protocol):
    """A scorer that is trained; `distributed.engine` has its backward pass and its optimizer step."""

    checkpoint_engine: Any
    _copy_recovery_script: Any

    def save_checkpoint(self, save_dir: str, **named: Any) -> Any: ...

    def load_checkpoint(self, load_dir: str, **named: Any) -> Any: ...


def host_batch(dataset: PairDataset, micro_batch: MicroBatch, pad_token_id: int, layout: Layout) -> PairBatch:
    """A micro-batch on the host, ready to be copied to the device."""
    pairs = [dataset[int(i)] for i in micro_batch.indices]
    size = micro_batch.group_size
    batch = make_batch(
        layout, pairs, micro_batch.weights, pad_token_id, group_size=size, group_rank=ranks.rank() % size
    )
    return batch.pinned() if ranks.device().type == "cuda" else batch


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Tell transformers that rows hold one sequence each, as padded ones do.

    It would look for several in the position ids that it has made itself, and make the host wait for the device in
    every forward pass, to find none.
    """
    from transformers import masking_utils

    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Make sure that backbone, head and the known transform give this model's own logits, before it is wrapped.

    An architecture that does something more between hidden states and logits would train on wrong log-probs in
    silence. Not for ZeRO-3 shards, whose weights are not there before the engine is.

    Raises:
        ModelError: naming the architecture and the largest difference.
    """
    device = next(model.parameters()).device
    ids = torch.arange(min(8, model.config.get_text_config().vocab_size), device=device)[None]
    training = model.training
    model.eval()
    expected = model(input_ids=ids, use_cache=False).logits.double()
    backbone, head = backbone_and_head(model)
    logits = head(backbone(input_ids=ids, use_cache=False).last_hidden_state).double()
    model.train(training)
    if not expected.isfinite().all():
        raise ModelError(f"{model.config.name_or_path}: its logits are not finite: its weights are damaged")
    transform = head_transform(model.config)
    logits = logits * transform.logit_scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    error = (logits - expected).abs().max().item()
    # both come from the same products; only the order of roundings in the model's dtype may differ
    allowed = 4 * torch.finfo(head.weight.dtype).eps * max(1.0, expected.abs().max().item())
    if not error <= allowed:
        raise ModelError(
            f"{type(model).__name__}: its logits are not its head applied to its last hidden state with the scale and "
            f"soft-cap of its config (they differ by {error:.3g}); this architecture is not supported"
        )
