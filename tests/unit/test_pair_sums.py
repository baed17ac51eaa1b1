"""From token log-probs to pairs: sums per completion, LD-DPO's and WPO's weights, against Python loops."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_scale.losses import sum_token_logps, wpo_weights


def ragged(lengths, seed=0, dtype=torch.float32):
    """Token log-probs [S], segments [S] and lengths [P, 2]."""
    counts = torch.tensor(lengths).flatten()
    segments = torch.arange(len(counts)).repeat_interleave(counts)
    values = -torch.rand(int(counts.sum()), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 9
    return values.to(dtype), segments, torch.tensor(lengths)


def loop(values, lengths, ld_alpha=1.0):
    """Sums in exact arithmetic (math.fsum), completion by completion."""
    tokens, sums = iter(values.tolist()), []
    for pair in lengths.tolist():
        row = [[next(tokens) for _ in range(count)] for count in pair]
        shared = min(pair)
        sums.append([math.fsum(x[:shared]) + ld_alpha * math.fsum(x[shared:]) for x in row])
    return sums


CASES = {
    "usual": [(3, 5), (7, 2), (4, 4)],
    "one pair": [(1, 1)],
    "empty completions": [(0, 3), (2, 0), (0, 0), (1, 1), (0, 0)],
    "nothing at all": [(0, 0), (0, 0)],
    "no pairs": [],
}


@pytest.mark.parametrize("ld_alpha", (None, 0.0, 0.3, 1.0))
@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_a_loop(case, ld_alpha):
    values, segments, lengths = (
        ragged(CASES[case])
        if CASES[case]
        else (torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64))
    )
    sums = sum_token_logps(values, segments, len(lengths), lengths, ld_alpha)
    assert sums.shape == (len(lengths), 2) and sums.dtype == torch.float32
    for found, hand in zip(sums.tolist(), loop(values, lengths, 1.0 if ld_alpha is None else ld_alpha), strict=True):
        assert found == pytest.approx(hand, rel=1e-6)


@pytest.mark.parametrize("ld_alpha", (None, 0.3))
@pytest.mark.parametrize("case", ("usual", "empty completions", "nothing at all"))
def test_a_tokens_gradient_is_its_weight_times_its_sums_gradient(case, ld_alpha):
    values, segments, lengths = ragged(CASES[case], dtype=torch.float64)
    upstream = torch.arange(1.0, 2 * len(lengths) + 1, dtype=torch.float64).view(-1, 2)
    values.requires_grad_()
    (sum_token_logps(values, segments, len(lengths), lengths, ld_alpha) * upstream).sum().backward()
    hand = []
    for pair, ups in zip(lengths.tolist(), upstream.tolist(), strict=True):
        for count, up in zip(pair, ups, strict=True):
            hand += [up * (1.0 if ld_alpha is None or t < min(pair) else ld_alpha) for t in range(count)]
    assert values.grad.tolist() == pytest.approx(hand)


def test_a_long_sum_is_as_exact_as_fp32_can_say():
    """Twenty thousand tokens after a thousand others: a running fp32 sum would be off by 1e-5 of it."""
    values, segments, lengths = ragged([(1000, 20000), (20000, 3)])
    sums = sum_token_logps(values, segments, 2, lengths).flatten().tolist()
    for found, hand in zip(sums, sum(loop(values, lengths), []), strict=True):
        assert found == pytest.approx(hand, rel=6e-8)


def test_sums_do_not_depend_on_the_other_pairs():
    lengths = [(3, 5), (700, 21), (4, 4)]
    values, segments, _ = ragged(lengths)
    together = sum_token_logps(values, segments, 3, torch.tensor(lengths))
    middle = (segments == 2) | (segments == 3)
    alone = sum_token_logps(values[middle], segments[middle] - 2, 1, torch.tensor(lengths[1:2]))
    assert torch.equal(together[1:2], alone)


def test_trailing_pairs_without_tokens_are_zero():
    values, segments, _ = ragged([(2, 2)])
    sums = sum_token_logps(values, segments, 3, torch.tensor([(2, 2), (0, 0), (0, 0)]))
    assert sums[1:].tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("case", ("usual", "empty completions"))
def test_wpo_weights_are_their_definition(case):
    logps, segments, lengths = ragged(CASES[case], seed=1)
    log_sum_p2 = ragged(CASES[case], seed=2)[0] / 3
    weights = wpo_weights(logps.requires_grad_(), log_sum_p2, segments, len(lengths))
    pairs = []
    for row in range(len(lengths)):
        product = 1.0
        for segment in (2 * row, 2 * row + 1):
            chosen = (segments == segment).nonzero().flatten().tolist()
            terms = [logps[t].item() - log_sum_p2[t].item() for t in chosen]
            product *= math.exp(sum(terms) / len(terms)) if terms else 1.0
        pairs.append(product)
    assert weights.tolist() == pytest.approx(pairs, rel=1e-5)
    assert not weights.requires_grad


def test_wpo_weight_is_one_for_uniform_distributions():
    """log p = -log V and log sum p^2 = -log V for every token: as likely as the policy's own writing."""
    segments = torch.tensor([0, 0, 1, 2, 3, 3])
    uniform = torch.full((6,), -math.log(50))
    assert wpo_weights(uniform, uniform, segments, 2).tolist() == [1.0, 1.0]
