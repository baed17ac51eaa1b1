"""Memory of a micro-step's activations, measured on tensors that have no memory. Sizes are bytes.

The model's own code runs forward and backward on fake tensors, which have shapes and lifetimes but no data
(`forecast.fake_run`). A few layers are enough, as layers of one kind keep the same. What our head takes is calculated
(`forecast.head`).

A CPU's attention goes through a row sequence by sequence, so the row itself is run. What a GPU's kernels keep is affine
in the tokens. There the two powers of two around a row's tokens are run, once for all rows between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dpo_scale.data.layout import Layout, Segment, pair_tokens, row_widths
from dpo_scale.data.planning import Planner, StepPlan
from dpo_scale.errors import ModelError, first_line
from dpo_scale.forecast.fake_model import build_model, layer_kinds, layers_needed, make_fake, stand_in_attention
from dpo_scale.forecast.fake_run import LayerBytes, PassBytes, measure_pass
from dpo_scale.forecast.head import HeadBytes, HeadCall, head_bytes
from dpo_scale.models.attention import AttentionPlan
from dpo_scale.models.load import reference_source
from dpo_scale.models.router import has_router
from dpo_scale.models.scorer import backbone_and_head, causal_lm, head_transform, one_sequence_a_row
from dpo_scale.models.zero3 import decoder_layers
from dpo_scale.settings.tree import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KEPT = "activations of the layers"
WORKING = "working memory of a layer"
ENDS = "embeddings' output and last norm"
HEAD = "head and loss"
ON_HOST = "offloaded inputs of the layers"


@dataclass(frozen=True)
class Rows:
    """What one rank computes in one pass.

    Attributes:
        tokens: that it holds, padding included.
        scored: tokens of each pair's two completions, of the whole row where ranks share it.
        count: of rows.
        segments: of the one row, as in `PairBatch`; None if rows are padded.
        group_size: ranks that share the row.
    """

    tokens: int
    scored: tuple[int, ...]
    count: int = 1
    segments: tuple[Segment, ...] | None = None
    group_size: int = 1


def rows_of(layout: Layout, lengths: np.ndarray, group_size: int = 1) -> Rows:
    """A micro-batch of pairs with these lengths [n, 3] of prompt, chosen and rejected."""
    scored = tuple(int(n) for n in lengths[:, 1:].sum(axis=1))
    if layout == "padded":
        count = 2 * len(lengths)
        return Rows(count * int(row_widths(lengths).max()), scored, count)
    segments: list[Segment] = []
    for prompt, chosen, rejected in lengths.tolist():
        branch = (rejected, prompt) if layout == "shared_prefix" else (prompt + rejected, 0)
        segments += [(prompt + chosen, 0), branch]
    tokens = int(pair_tokens(lengths, layout).sum())
    if missing := -tokens % group_size:
        segments.append((missing, 0))
    return Rows((tokens + missing) // group_size, scored, 1, tuple(segments), group_size)


def fullest_rows(planner: Planner, plans: Sequence[StepPlan]) -> tuple[Rows, Rows | None]:
    """The pass with most tokens on a rank in these steps: of the policy, and of a reference if one runs in them."""

    def fullest(passes: list[Any]) -> Rows:
        batches = [batch for of_steps in passes for of_ranks in of_steps for batch in of_ranks]
        found = (rows_of(planner.layout, planner.lengths[batch.indices], batch.group_size) for batch in batches)
        return max(found, key=lambda rows: (rows.tokens, sum(rows.scored)))

    reference = [plan.reference_passes for plan in plans if plan.reference_passes]
    return fullest([plan.micro_steps for plan in plans]), fullest(reference) if reference else None


class ActivationModel:
    """What a run's policy and reference hold beside their states, for any rows.

    Args:
        model_config: the policy's.
        device_type: "cuda" or "cpu".
        reference_config: of a reference that is another model; None: as the policy.
        liger: whether the models take Liger's kernels.
    """

    def __init__(
        self,
        config: Config,
        model_config: PreTrainedConfig,
        device_type: str,
        *,
        reference_config: PreTrainedConfig | None = None,
        liger: bool = False,
    ) -> None:
        self.config, self.device_type, self._liger = config, device_type, liger
        self._configs = {True: model_config, False: reference_config or model_config}  # of the policy: True
        self._kinds = {policy: layer_kinds(of) for policy, of in self._configs.items()}
        self._measured: dict[Any, PassBytes] = {}
        self._models: dict[bool, Any] = {}

    def micro_step(self, rows: Rows) -> dict[str, int]:
        """Part -> bytes, when most is held between the beginning of a forward pass and the end of its backward pass.

        Raises:
            ModelError: if the model's code cannot run without data.
        """
        passed, head = self._pass(rows, policy=True), self._head(rows, policy=True)
        layers = self._all_layers(passed, policy=True)
        text = self._configs[True].get_text_config()
        weight = text.vocab_size * text.hidden_size * self._dtype.itemsize
        # a tied weight's gradient waits for that of the embeddings
        left = weight if text.tie_word_embeddings and not self.config.lora.enabled else 0
        scored = sum(self._scored(rows)) * text.hidden_size * self._dtype.itemsize
        kept, ends = sum(layer.kept for layer in layers), passed.before + passed.after
        moments = [
            {KEPT: kept, ENDS: ends, HEAD: max(head.forward, head.backward)},
            {KEPT: kept, ENDS: ends, WORKING: passed.turn, HEAD: left + scored},
            {ENDS: passed.before, WORKING: passed.end, HEAD: left},
        ]
        so_far = 0.0
        for layer in layers:
            so_far += layer.kept
            moments.append({KEPT: so_far, ENDS: passed.before, WORKING: layer.backward, HEAD: left})
        return _fullest(moments)

    def reference_pass(self, rows: Rows) -> dict[str, int]:
        """Part -> bytes, when most is held in a pass without gradient. No activations of the policy exist then."""
        passed, head = self._pass(rows, policy=False), self._head(rows, policy=False)
        moments, held = [], passed.before
        for layer in passed.layers:  # what one leaves is for all that follow, such as a mask; later ones leave nothing
            moments.append({ENDS: held, WORKING: layer.forward})
            held += layer.kept
        return _fullest([*moments, {ENDS: held + passed.after, HEAD: head.forward}])

    def host(self, rows: Rows) -> dict[str, int]:
        """Part -> bytes of a rank's activations in host memory."""
        if not self._offloads:
            return {}
        return {ON_HOST: self._hidden(rows, policy=True) * len(self._kinds[True])}

    @property
    def left_out(self) -> tuple[str, ...]:
        """What of the config is not modelled, by name."""
        model, found = self.config.model, []
        if model.compile:
            found.append("model.compile: activations are those of layers that are not compiled, which keep more")
        if model.attn_implementation == "eager" and self.device_type == "cuda":
            found.append("model.attn_implementation = eager: its scores are not counted")
        widest = max(getattr(of.get_text_config(), "head_dim", 0) or 0 for of in self._configs.values())
        if widest > 256 and self.device_type == "cuda":
            found.append("attention of heads wider than 256: its scores are not counted")
        return tuple(found)

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.config.model.dtype)

    @property
    def _offloads(self) -> bool:
        settings = self.config.model
        offloads = settings.gradient_checkpointing and settings.gradient_checkpointing_offload
        return offloads and self.device_type != "cpu"

    def _hidden(self, rows: Rows, *, policy: bool) -> int:
        """Bytes of the hidden states between two layers."""
        return rows.tokens * self._configs[policy].get_text_config().hidden_size * self._dtype.itemsize

    def _scored(self, rows: Rows) -> list[int]:
        """[P] tokens of each pair that a rank scores."""
        return [-(-count // rows.group_size) for count in rows.scored]

    def _all_layers(self, passed: PassBytes, *, policy: bool) -> list[LayerBytes]:
        """Of the whole model: those that were run, then as the last that was run of their kind."""
        kinds, run = self._kinds[policy], len(passed.layers)
        last = dict(zip(kinds[:run], passed.layers, strict=True))
        return [*passed.layers, *(last[kind] for kind in kinds[run:])]

    def _head(self, rows: Rows, *, policy: bool) -> HeadBytes:
        config, model_config = self.config, self._configs[policy]
        text = model_config.get_text_config()
        full = policy and not config.lora.enabled
        asked, option = config.logprobs.implementation, config.logprobs.pair_loss
        in_kernels = self.device_type == "cuda" and self._dtype != torch.float32
        name = asked if asked != "auto" else "triton" if in_kernels else "chunked"
        # as `training.objective.choose_objective` has it
        by_pair = option == "fused" or (option == "auto" and config.loss.is_pairwise and asked == "auto" and full)
        call = HeadCall(
            self._scored(rows), text.hidden_size, text.vocab_size, self._dtype, self.device_type, (policy, full),
            head_transform(model_config).softcap is not None,
        )  # fmt: skip
        return head_bytes(call, name, by_pair=policy and by_pair and not config.loss.needs_batch)

    def _pass(self, rows: Rows, *, policy: bool) -> PassBytes:
        if self.device_type == "cpu":
            return self._run(policy, rows.tokens, rows.count, rows.segments, 0, rows.group_size)
        copied = self._copied_keys(rows)
        low = 1 << max(8, rows.tokens.bit_length() - 1)
        first, second = (self._run(policy, tokens, 1, None, 0, rows.group_size) for tokens in (low, 2 * low))
        part = (rows.tokens - low) / low
        weighted = [(1 - part, first), (part, second)]
        if copied:
            share = copied / (2 * low)
            with_copies = self._run(policy, 2 * low, 1, None, 2 * low, rows.group_size)
            weighted += [(share, with_copies), (-share, second)]
        found = _combined(weighted)
        if policy and self._offloads:
            hidden = self._hidden(rows, policy=True)
            layers = tuple(LayerBytes(x.kept - hidden, x.forward, x.backward + hidden) for x in found.layers)
            found = PassBytes(found.before, layers, found.after, found.turn, found.end)
        return found

    def _copied_keys(self, rows: Rows) -> int:
        """Tokens whose keys a variable-length kernel gets copies of, as many as a rank's share of the heads has."""
        text, asked = self._configs[True].get_text_config(), self.config.model.attn_implementation
        by_length = self._dtype != torch.float32 and not getattr(text, "attn_logit_softcapping", None)
        if rows.segments is None or asked == "flex_attention" or not by_length:
            return 0
        return sum(shared for _, shared in rows.segments) // rows.group_size

    def _run(
        self,
        policy: bool,
        tokens: int,
        count: int,
        segments: tuple[Segment, ...] | None,
        copied_keys: int,
        group_size: int,
    ) -> PassBytes:
        """The pass of a model's first layers, measured once for equal arguments."""
        key = policy, tokens, count, segments, copied_keys, group_size
        if key not in self._measured:
            from torch._subclasses.fake_tensor import FakeTensorMode

            kinds = self._kinds[policy]
            model = build_model(
                self.config, self._configs[policy], layers_needed(kinds), policy=policy,
                adapter=reference_source(self.config).adapter, liger=self._liger,
            )  # fmt: skip
            try:
                with FakeTensorMode():
                    make_fake(model)
                    self._measured[key] = self._run_fake(model, *key)
            except (RuntimeError, NotImplementedError, torch._subclasses.fake_tensor.DynamicOutputShapeException) as e:
                kind = self._configs[policy].model_type
                raise ModelError(f"activations of a {kind} model cannot be forecast: {first_line(e)}") from e
        return self._measured[key]

    def _run_fake(
        self,
        model: Any,
        policy: bool,
        tokens: int,
        count: int,
        segments: tuple[Segment, ...] | None,
        copied_keys: int,
        group_size: int,
    ) -> PassBytes:
        model_config = self._configs[policy]
        whole, (backbone, _) = causal_lm(model), backbone_and_head(model)
        inputs: dict[str, Any] = {"input_ids": torch.zeros((count, tokens // count), dtype=torch.long)}
        in_blocks = self.device_type == "cpu"
        stands_in = segments is not None or not in_blocks
        if stands_in:
            stand_in_attention(whole, in_blocks=in_blocks, copied_keys=copied_keys, group_size=group_size)
            inputs["position_ids"] = torch.zeros((1, tokens), dtype=torch.long)
        elif self.config.model.attn_implementation is not None:
            whole.set_attn_implementation(self.config.model.attn_implementation)
        if segments is not None:
            ids = torch.zeros((1, tokens * group_size), dtype=torch.long)
            inputs["attention_plan"] = AttentionPlan(ids, ids, ids, segments)
        balanced = policy and has_router(model_config)
        if has_router(model_config):
            inputs["output_router_logits"] = balanced

        def run() -> tuple[torch.Tensor, Any]:
            with nullcontext() if segments is not None else one_sequence_a_row():
                output = backbone(use_cache=False, **inputs)
            differentiated = balanced and self.config.loss.router_aux_loss_coef
            return output.last_hidden_state, output.router_logits if differentiated else None

        return measure_pass(model, decoder_layers(whole), run, training=policy)


def _combined(weighted: Sequence[tuple[float, PassBytes]]) -> PassBytes:
    """The sum of passes of the same layers, each times its weight."""

    def total(get: Any) -> float:
        return sum(weight * get(passed) for weight, passed in weighted)

    layers = tuple(
        LayerBytes(*(total(lambda passed, i=i, name=name: getattr(passed.layers[i], name)) for name in names))
        for i in range(len(weighted[0][1].layers))
        for names in [("kept", "forward", "backward")]
    )
    ends = [total(lambda passed, name=name: getattr(passed, name)) for name in ("before", "after", "turn", "end")]
    return PassBytes(ends[0], layers, *ends[1:])


def _fullest(moments: Sequence[dict[str, float]]) -> dict[str, int]:
    """The moment at which most is held."""
    most = max(moments, key=lambda parts: sum(parts.values()))
    return {name: round(most.get(name, 0)) for name in (KEPT, WORKING, ENDS, HEAD)}
