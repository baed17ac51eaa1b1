"""How much arithmetic pairs are: what batches are balanced by, and what utilisation is measured against.

Counted are the products of matrices, a multiplication and an addition as two:

    forward = 2 N tokens + sum over layers of 4 W attended + 2 H V scored

N: weights of the layers that a token meets (no embeddings, no head; of a mixture of experts the share that is routed
to). W: attention heads times their size. attended: (query, key) pairs that the causal mask and the layer's window let
through. H, V: hidden size and vocabulary; only completion tokens are scored. A backward pass is twice its forward
pass, or once where weights are frozen, as under LoRA: no gradient of theirs is computed. Recomputed activations,
optimizers, norms and adapters count as nothing.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from dpo_scale.data.layout import Layout


@dataclass(frozen=True)
class ForwardFlops:
    """The FLOPs of a forward pass, by what it is made of.

    Attributes:
        per_token: of the layers' weights.
        per_scored_token: of the head.
        attention: (window, FLOPs of an attended (query, key) pair, summed over the layers of this window); a query
            sees `window` keys at most, all where it is None.
    """

    per_token: float
    per_scored_token: float
    attention: tuple[tuple[int | None, float], ...]

    def of_sequences(self, tokens: np.ndarray) -> np.ndarray:
        """The layers' FLOPs of sequences of so many tokens, float64 [n]; the head is apart."""
        return self.per_token * tokens + self._attention(np.zeros_like(tokens), tokens)

    def of_pairs(
        self, lengths: np.ndarray, layout: Layout, *, weights: float = 1.0, attention: float = 1.0
    ) -> np.ndarray:
        """FLOPs of pairs, float64 [n].

        Args:
            lengths: [n, 3] tokens of prompt, chosen and rejected.
            layout: `shared_prefix` computes the prompt once, `packed` twice; `padded` also the shorter completion's
                padding, up to the pair's own longer row.
            weights, attention: passes over the weights and over attention, in forward passes: 3 and 3 for training,
                2 and 3 where the weights are frozen.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        prompt, completions = lengths[:, :1], lengths[:, 1:]
        scored = weights * self.per_scored_token * completions.sum(axis=1)
        if layout == "shared_prefix":
            tokens = lengths.sum(axis=1)
            attended = self._attention(np.zeros_like(prompt), prompt)[:, 0]
            attended += self._attention(prompt, prompt + completions).sum(axis=1)
        else:
            rows = prompt + completions
            if layout == "padded":
                rows = np.broadcast_to(rows.max(axis=1, keepdims=True), rows.shape)
            tokens = rows.sum(axis=1)
            attended = self._attention(np.zeros_like(rows), rows).sum(axis=1)
        return weights * self.per_token * tokens + attention * attended + scored

    def _attention(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """FLOPs of the queries at positions `start` to `end` - 1 of a sequence."""

        def keys_before(position: np.ndarray, window: int | None) -> np.ndarray:
            full = position if window is None else np.minimum(position, window)
            return full * (full + 1) / 2 + (0 if window is None else (position - full) * window)

        total = np.zeros(np.broadcast(start, end).shape)
        for window, flops in self.attention:
            total += flops * (keys_before(end, window) - keys_before(start, window))
        return total


def forward_flops(model_config: PreTrainedConfig, *, trust_remote_code: bool = False) -> ForwardFlops:
    """The FLOPs of a model by its transformers config; its weights are counted on a model without any memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # a copy, because building a model writes into its config
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), trust_remote_code=trust_remote_code)
    text = model_config.get_text_config()
    head = model.get_output_embeddings()
    outside = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    if head is not None:
        outside.add(id(head.weight))
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    routed = (getattr(text, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    weights = sum(
        # of experts, the biases have two dimensions as well
        parameter.numel() * (routed if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not name.endswith("bias") and id(parameter) not in outside
    )
    return ForwardFlops(2.0 * weights, 2.0 * text.hidden_size * text.vocab_size, _attention_of(text))


def _attention_of(text: Any) -> tuple[tuple[int | None, float], ...]:
    heads = getattr(text, "num_attention_heads", None)
    if not heads:  # no attention at all
        return ()
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention"] * text.num_hidden_layers
    windows = {"full_attention": None, "sliding_attention": window}  # other kinds have no attention
    counts = Counter(windows[kind] for kind in kinds if kind in windows)
    return tuple((size, 4.0 * width * count) for size, count in counts.items())
