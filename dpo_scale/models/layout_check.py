"""The check that a layout gives a loaded model the log-probs, and its attention the gradients, of separate sequences.

A few pairs of random tokens go through the model twice: padded, with the model's own attention, and in the layout, with
the back end that is to keep sequences apart; where groups of ranks share rows, shared as well. Back ends choose kernels
by length. So one row is short, and one is longer
than the blocks that they compute in.

Gradients are those of the attention alone, layer by layer, beside those of `blockwise_attention` in fp32. A backward
pass of the whole model would go through its engine. Queries, keys and values are random, with scores of variance 1.
In a trained model attention may be nearly all on one key; its gradients are then differences of nearly equal numbers,
of which only rounding is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_scale.data.dataset import Pair
from dpo_scale.data.layout import Layout, PairBatch, make_batch
from dpo_scale.distributed import ranks
from dpo_scale.errors import first_line
from dpo_scale.models.attention import blockwise_attention
from dpo_scale.models.attention_backends import BACKENDS, Attention, observed, use_attention

# Mean difference per token that another order of the same sums may cause. Random tokens are far less likely than text,
# and deep models in 16 bits may differ by more. So several times what padding alone changes is allowed too, up to a
# limit: sequences that see each other differ by tenths and more.
_ALLOWED_PER_TOKEN = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
_TIMES_PADDING, _MOST_ALLOWED = 4.0, 0.3
# Norm of a gradient's error, by its own norm. 16 bits round by a few thousandths; one key too many makes tenths.
_ALLOWED_IN_GRADIENT = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 5e-2}
# Tokens of prompt, chosen and rejected. The second row is longer than FlexAttention's blocks of 128, and so is one of
# its documents, with its branches in different blocks.
_ROWS = [[(9, 7, 5), (1, 4, 8)], [(120, 30, 40), (40, 3, 20), (1, 30, 2)]]


@torch.no_grad()
def check_layout(scorer: Any, model: Any, layout: Layout, backend: str, dtype: str) -> str | None:
    """Why a layout does not give a model the log-probs of separate sequences; None if it does.

    Every rank calls it and gets the same answer: a failure on one is a failure on all. The back end stays in place.

    Args:
        scorer: an engine around a `PairScorer`, at any stage; gradients are checked if it is in training mode. Rows are
            shared as in its smallest and its largest `groups`.
        model: the transformers model inside it, with `own_attention` (`layouts.install_attention`).
        dtype: of the model.
    """
    was_training = scorer.module.training
    scorer.eval()
    watcher, sizes_of_groups = _Watcher(gradients=was_training), scorer.module.groups.sizes
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or 2**31  # where a table of positions may end
    apart = []

    def log_probs(batch: PairBatch) -> Tensor:
        return scorer(**batch.to(ranks.device()).scorer_inputs)

    for sizes in _ROWS:
        pairs = _random_pairs(sizes, text.vocab_size, longest)
        weights = np.ones(len(pairs), dtype=np.float32)
        model.set_attn_implementation(model.own_attention)
        expected = log_probs(make_batch("padded", pairs, weights, 0))
        alone = torch.cat([log_probs(make_batch("padded", [pair], weights[:1], 0)) for pair in pairs])
        use_attention(model, backend)
        by_padding = (alone - expected).abs().mean().item()
        for size in sorted({sizes_of_groups[0], sizes_of_groups[-1]}):
            share = {"group_size": size, "group_rank": ranks.rank() % size}
            with observed(watcher):
                got = log_probs(make_batch(layout, pairs, weights, 0, **share))
            difference = (got - expected).abs().mean().item()
            if not difference <= max(_ALLOWED_PER_TOKEN[dtype], min(_TIMES_PADDING * by_padding, _MOST_ALLOWED)):
                shared = f" of rows that {size} ranks share" if size > 1 else ""
                apart.append(
                    f"it does not give the log-probs of separate sequences{shared} ({difference:.3g} a token apart)"
                )
    scorer.train(was_training)
    failures = ranks.gather_objects(next(iter([*watcher.raised, *apart, *watcher.wrong_gradients]), None))
    where = [f" (on rank {rank})" if len(failures) > 1 else "" for rank in range(len(failures))]
    return next((failure + at for failure, at in zip(failures, where, strict=True) if failure is not None), None)


class _Watcher:
    """Stands between a model and its attention: keeps what a back end raises, and compares its gradients.

    A layer whose attention raised goes on with zeros. So all ranks of a sharded model take part in the same collectives
    up to the end of the pass.
    """

    def __init__(self, *, gradients: bool) -> None:
        self.raised: list[str] = []
        self.wrong_gradients: list[str] = []
        self._gradients, self._compared = gradients, set[Any]()

    def __call__(
        self, backend: str, function: Attention, module: Any, *inputs: Any, **settings: Any
    ) -> tuple[Tensor, None]:
        try:
            output = function(module, *inputs, **settings)
            if self._gradients and BACKENDS[backend].attend is not blockwise_attention:
                self._compare(function, module, *inputs, settings)
            return output
        except Exception as error:
            self.raised.append(f"{type(error).__name__}: {first_line(error)}")
            query, _, value, _ = inputs
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

    def _compare(
        self, function: Attention, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, settings: dict
    ) -> None:
        """Once for each kind of layer and row."""
        kind = (query.shape, key.shape, *(settings.get(name) for name in ("sliding_window", "softcap")))
        if kind in self._compared:
            return
        self._compared.add(kind)
        drawn = torch.Generator(query.device).manual_seed(0)
        inputs = [torch.randn(t.shape, generator=drawn, device=t.device, dtype=t.dtype) for t in (query, key, value)]
        inputs[0] *= 1 / ((settings.get("scaling") or query.shape[-1] ** -0.5) * query.shape[-1] ** 0.5)
        got = _gradients(function, module, inputs, mask, settings)
        sinks = settings.get("s_aux")
        exact = settings if sinks is None else {**settings, "s_aux": sinks.float()}
        expected = _gradients(blockwise_attention, module, [tensor.float() for tensor in inputs], mask, exact)
        for name, ours, right in zip(("queries", "keys", "values"), got, expected, strict=True):
            error = ((ours.float() - right).norm() / right.norm().clamp(min=1e-12)).item()
            if not error <= _ALLOWED_IN_GRADIENT[query.dtype]:
                self.wrong_gradients.append(f"its gradient of {name} is wrong (relative error {error:.3g})")


@torch.enable_grad()
def _gradients(
    function: Attention, module: Any, inputs: list[Tensor], mask: Any, settings: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Of half the sum of the outputs' squares, with respect to queries, keys and values."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output, _ = function(module, *leaves, mask, **settings)
    return torch.autograd.grad(output, leaves, output.detach())


def _random_pairs(sizes: list[tuple[int, int, int]], vocabulary: int, longest: int) -> list[Pair]:
    """Pairs of random tokens, the same on every rank, no sequence of them longer than `longest`."""
    draw = np.random.default_rng(0)
    shares = min(1.0, longest / max(prompt + max(completions) for prompt, *completions in sizes))
    of_pairs = [[max(1, int(n * shares)) for n in of_pair] for of_pair in sizes]
    return [Pair(*(draw.integers(0, vocabulary, n) for n in of_pair), b"", i) for i, of_pair in enumerate(of_pairs)]
