"""Preference losses as pure functions of log-prob sums: the whole table, one short function a row.

Letters, for a pair with prompt x, chosen completion y_c and rejected y_r:

    s_c, s_r   log pi(y_c|x), log pi(y_r|x): the policy's log-probs, summed over completion tokens
    r_c, r_r   the same under the reference model
    L_c = s_c - r_c,  L_r = s_r - r_r            log-ratios; b * L is the implicit reward
    D = score(L_c) - score(L_r)                  score is the identity, unless an f-divergence replaces it
    n_c, n_r   numbers of completion tokens;  b = beta, e = label_smoothing, ls = log sigmoid

Shapes: [P] or [P, 2] over the P pairs of a micro-step, column 0 chosen, 1 rejected; [S] over scored tokens.

`preference_loss` returns a loss per pair and no mean: the mean is over the *global* batch, whose other micro-batches
and ranks are not known here. Everything is computed in fp32 (fp64 if the inputs are), under autocast too. Values and
gradients stay finite when a run has gone far astray: sigmoids are taken as logarithms, differences near 1 by expm1,
and exponents are clamped at `EXPONENT_LIMIT`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_scale.settings.loss import LOSSES, LossSettings

Formula = Callable[["Pairs"], Tensor]  # the losses [P] of the pairs
FORMULAS: dict[str, Formula] = {}  # by the names of LOSSES

# exp(30) = 1e13 is far beyond where every loss of D is saturated. Its square is still an fp32 number, so a gradient
# norm can be taken. Beyond the limit a score is constant and its gradient 0.
EXPONENT_LIMIT = 30.0


@dataclass(frozen=True)
class Pairs:
    """What a loss may read: tensors [P], fp32 or fp64. Those of the reference are None if no loss needs them."""

    settings: LossSettings
    s_c: Tensor
    s_r: Tensor
    n_c: Tensor
    n_r: Tensor
    r_c: Tensor | None = None
    r_r: Tensor | None = None
    mean_chosen_tokens: float | Tensor | None = None

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """L_c and L_r."""
        assert self.r_c is not None and self.r_r is not None, "this loss reads reference log-probs"
        return self.s_c - self.r_c, self.s_r - self.r_r

    @property
    def scaled_d(self) -> Tensor:
        """b * D."""
        l_c, l_r = self.log_ratios
        return self.settings.beta * (_score(l_c, self.settings) - _score(l_r, self.settings))


def preference_loss(
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    lengths: Tensor,
    settings: LossSettings,
    *,
    mean_chosen_tokens: float | Tensor | None = None,
    pair_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the chosen losses for each pair, and the metrics of each pair.

    policy_logps: [P, 2] sums s_c, s_r of completion log-probs; the loss is differentiable in it.
    reference_logps: [P, 2] sums r_c, r_r; read only if `settings.needs_reference`, may be None otherwise.
    lengths: [P, 2] numbers of completion tokens n_c, n_r. 0 counts as 1, so that a completion without tokens has a
        finite loss and gradient.
    settings: validated `LossSettings`.
    mean_chosen_tokens: mean of n_c over the pairs of the global batch. `sft` needs it: its mean over pairs is then the
        negative log-likelihood per chosen token of the whole batch.
    pair_weights: [P] detached weights of the pairs (`wpo_weights`); the summed loss is multiplied by them.

    Returns the loss [P], fp32 (fp64 if policy_logps is), and detached metrics, name -> [P]: `loss`,
    `loss/<name>` for each of several losses (unweighted), `rewards/{chosen,rejected,margins,accuracies}`,
    `logps/{chosen,rejected,margins}`, `accuracy/policy`, and with a reference `ref_logps/margins` and `kl`.
    Rewards are b * L; an f-divergence does not change them. Where all losses are policy-only they are b * s,
    per token (b * s / n) if one of the losses compares means per token (`simpo`, `orpo`), as TRL logs them.

    With `aot` and `aot_unpaired` the caller passes all pairs of the micro-step, of all ranks, at once. Entry
    k of these losses belongs to the k-th smallest values, not to pair k: only their sum has a meaning.
    """
    assert policy_logps.ndim == 2 and policy_logps.shape[1] == 2, policy_logps.shape
    assert lengths.shape == policy_logps.shape, (lengths.shape, policy_logps.shape)
    dtype = torch.float64 if policy_logps.dtype == torch.float64 else torch.float32
    s_c, s_r = policy_logps.to(dtype).unbind(1)
    n_c, n_r = lengths.to(dtype).clamp(min=1.0).unbind(1)
    r_c = r_r = None
    if settings.needs_reference:
        assert reference_logps is not None, f"{settings.loss_types} needs reference log-probs"
        assert reference_logps.shape == policy_logps.shape, (reference_logps.shape, policy_logps.shape)
        r_c, r_r = reference_logps.detach().to(dtype).unbind(1)
    pairs = Pairs(settings, s_c, s_r, n_c, n_r, r_c, r_r, mean_chosen_tokens)
    names, weights = settings.loss_types, settings.weights
    values = {name: FORMULAS[name](pairs) for name in names}
    loss = torch.stack([weight * values[name] for name, weight in zip(names, weights, strict=True)]).sum(0)
    if pair_weights is not None:
        assert not settings.needs_batch and not pair_weights.requires_grad
        loss = loss * pair_weights.to(loss.dtype)
    with torch.no_grad():
        metrics = {"loss": loss.detach(), **_metrics(pairs)}
        if len(names) > 1:
            metrics |= {f"loss/{name}": value.detach() for name, value in values.items()}
    return loss, metrics


def _metrics(pairs: Pairs) -> dict[str, Tensor]:
    s_c, s_r, beta = pairs.s_c, pairs.s_r, pairs.settings.beta
    metrics = {}
    if pairs.r_c is not None and pairs.r_r is not None:
        l_c, l_r = pairs.log_ratios
        reward_c, reward_r = beta * l_c, beta * l_r
        metrics["ref_logps/margins"] = pairs.r_c - pairs.r_r
        metrics["kl"] = 0.5 * (l_c + l_r)
    elif any(LOSSES[name].per_token_rewards for name in pairs.settings.loss_types):
        reward_c, reward_r = beta * s_c / pairs.n_c, beta * s_r / pairs.n_r
    else:
        reward_c, reward_r = beta * s_c, beta * s_r
    metrics |= {
        "rewards/chosen": reward_c,
        "rewards/rejected": reward_r,
        "rewards/margins": reward_c - reward_r,
        "rewards/accuracies": (reward_c > reward_r).to(s_c.dtype),
        "logps/chosen": s_c,
        "logps/rejected": s_r,
        "logps/margins": s_c - s_r,
        "accuracy/policy": (s_c > s_r).to(s_c.dtype),
    }
    return {name: value.detach() for name, value in metrics.items()}


def _score(log_ratio: Tensor, settings: LossSettings) -> Tensor:
    """f'(exp(L)) up to a constant, f being the divergence's (arXiv 2309.16240, theorem 1)."""
    if settings.f_divergence == "reverse_kl":
        return log_ratio
    if settings.f_divergence == "forward_kl":
        return -torch.expm1((-log_ratio).clamp(max=EXPONENT_LIMIT))
    if settings.f_divergence == "js":
        return math.log(2.0) + F.logsigmoid(log_ratio)
    assert settings.f_divergence == "alpha", settings.f_divergence
    power = settings.f_alpha_divergence_coef - 1.0
    return torch.expm1((power * log_ratio).clamp(max=EXPONENT_LIMIT)) / power


def _smoothed_logistic(x: Tensor, smoothing: float) -> Tensor:
    """-(1-e) ls(x) - e ls(-x)."""
    return -(1.0 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


def formula(function: Formula) -> Formula:
    """Make a function the formula of the loss of its name, which has a row in `LOSSES`."""
    FORMULAS[function.__name__] = function
    return function


# ---- losses of D -----------------------------------------------------------------------------------------


@formula
def sigmoid(p: Pairs) -> Tensor:
    """-(1-e) ls(bD) - e ls(-bD): eq. 7 of DPO for e = 0, cDPO for e > 0."""
    return _smoothed_logistic(p.scaled_d, p.settings.label_smoothing)


@formula
def robust(p: Pairs) -> Tensor:
    """[-(1-e) ls(bD) + e ls(-bD)] / (1-2e): unbiased if a share e of the labels is swapped."""
    e, x = p.settings.label_smoothing, p.scaled_d
    return (-(1.0 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1.0 - 2.0 * e)


@formula
def hinge(p: Pairs) -> Tensor:
    """max(0, 1 - bD)."""
    return torch.relu(1.0 - p.scaled_d)


@formula
def exo_pair(p: Pairs) -> Tensor:
    """sig(bD) [ls(bD) - log(1-e)] + sig(-bD) [ls(-bD) - log e]: KL from softmax(bL) to the smoothed label."""
    e, x = p.settings.label_smoothing, p.scaled_d
    kept = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-e))
    return kept + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(e))


@formula
def discopop(p: Pairs) -> Tensor:
    """-ls(bD) (1-m) + exp(-bD) m with m = sig(bD/t); the last product as one exponential: no overflow."""
    x, tau = p.scaled_d, p.settings.discopop_tau
    return -F.logsigmoid(x) * torch.sigmoid(-x / tau) + torch.exp(F.logsigmoid(x / tau) - x)


# ---- losses of the two log-ratios ------------------------------------------------------------------------


@formula
def ipo(p: Pairs) -> Tensor:
    """(L_c/n_c - L_r/n_r - 1/(2b))^2: the form averaged over tokens."""
    l_c, l_r = p.log_ratios
    return (l_c / p.n_c - l_r / p.n_r - 0.5 / p.settings.beta).square()


@formula
def sigmoid_norm(p: Pairs) -> Tensor:
    """-ls(b (L_c/n_c - L_r/n_r))."""
    l_c, l_r = p.log_ratios
    return -F.logsigmoid(p.settings.beta * (l_c / p.n_c - l_r / p.n_r))


@formula
def nca_pair(p: Pairs) -> Tensor:
    """-ls(bL_c) - 0.5 ls(-bL_c) - 0.5 ls(-bL_r)."""
    x_c, x_r = _scaled_log_ratios(p)
    return -F.logsigmoid(x_c) - 0.5 * F.logsigmoid(-x_c) - 0.5 * F.logsigmoid(-x_r)


@formula
def bco_pair(p: Pairs) -> Tensor:
    """-ls(bL_c) - ls(-bL_r): without the running reward shift of the paper."""
    x_c, x_r = _scaled_log_ratios(p)
    return -F.logsigmoid(x_c) - F.logsigmoid(-x_r)


@formula
def sppo_hard(p: Pairs) -> Tensor:
    """(L_c - 1/(2b))^2 + (L_r + 1/(2b))^2: eq. 4.7 with win probabilities 1 and 0."""
    l_c, l_r = p.log_ratios
    half = 0.5 / p.settings.beta
    return (l_c - half).square() + (l_r + half).square()


@formula
def apo_zero(p: Pairs) -> Tensor:
    """1 - sig(bL_c) + sig(bL_r): raise the chosen, lower the rejected; 1 - sig(x) = sig(-x)."""
    x_c, x_r = _scaled_log_ratios(p)
    return torch.sigmoid(-x_c) + torch.sigmoid(x_r)


@formula
def apo_down(p: Pairs) -> Tensor:
    """sig(bL_c) + 1 - sig(b(L_c - L_r)): lower both, the rejected more."""
    x_c, x_r = _scaled_log_ratios(p)
    return torch.sigmoid(x_c) + torch.sigmoid(x_r - x_c)


def _scaled_log_ratios(p: Pairs) -> tuple[Tensor, Tensor]:
    l_c, l_r = p.log_ratios
    return p.settings.beta * l_c, p.settings.beta * l_r


# ---- losses over all pairs of a micro-step ---------------------------------------------------------------


@formula
def aot(p: Pairs) -> Tensor:
    """d = sort(s_c - s_r) - sort(r_c - r_r); -(1-e) ls(bd) - e ls(-bd): the policy's margins dominate."""
    assert p.r_c is not None and p.r_r is not None
    d = torch.sort(p.s_c - p.s_r).values - torch.sort(p.r_c - p.r_r).values
    return _smoothed_logistic(p.settings.beta * d, p.settings.label_smoothing)


@formula
def aot_unpaired(p: Pairs) -> Tensor:
    """d = sort(L_c) - sort(L_r); -(1-e) ls(bd) - e ls(-bd): chosen rewards dominate rejected ones."""
    l_c, l_r = p.log_ratios
    d = torch.sort(l_c).values - torch.sort(l_r).values
    return _smoothed_logistic(p.settings.beta * d, p.settings.label_smoothing)


# ---- policy-only losses ----------------------------------------------------------------------------------


@formula
def sft(p: Pairs) -> Tensor:
    """-s_c / (mean of n_c over the global batch), so that the mean over pairs weighs every token alike."""
    assert p.mean_chosen_tokens is not None, "sft needs the global batch's mean number of chosen tokens"
    return -p.s_c / p.mean_chosen_tokens


@formula
def simpo(p: Pairs) -> Tensor:
    """-ls(b (s_c/n_c - s_r/n_r) - gamma)."""
    return -F.logsigmoid(p.settings.beta * (p.s_c / p.n_c - p.s_r / p.n_r) - p.settings.simpo_gamma)


@formula
def orpo(p: Pairs) -> Tensor:
    """-s_c/n_c - lambda ls(log odds(s_c/n_c) - log odds(s_r/n_r)): NLL and odds ratio."""
    mean_c, mean_r = p.s_c / p.n_c, p.s_r / p.n_r
    return -mean_c - p.settings.orpo_lambda * F.logsigmoid(_log_odds(mean_c) - _log_odds(mean_r))


def _log_odds(logp: Tensor) -> Tensor:
    """p - log(1 - exp(p)) for log-probabilities p < 0; one that rounding has brought to 0 is moved off it."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


@formula
def cpo(p: Pairs) -> Tensor:
    """-ls(b (s_c - s_r)) + alpha (-s_c/n_c)."""
    preference = -F.logsigmoid(p.settings.beta * (p.s_c - p.s_r))
    return preference - p.settings.cpo_alpha * p.s_c / p.n_c


assert FORMULAS.keys() == LOSSES.keys(), FORMULAS.keys() ^ LOSSES.keys()


# ---- from tokens to pairs --------------------------------------------------------------------------------


def sum_token_logps(
    token_logps: Tensor,
    segments: Tensor,
    num_pairs: int,
    lengths: Tensor,
    ld_alpha: float | None = None,
) -> Tensor:
    """Sums of token log-probs per completion: [num_pairs, 2], differentiable in token_logps.

    token_logps: [S] log-probs, fp32 or fp64.
    segments: [S] integers, ascending: 2i for tokens of pair i's chosen completion, 2i + 1 for its rejected.
    lengths: [P, 2] numbers of completion tokens; read with ld_alpha only.
    ld_alpha: LD-DPO (arXiv 2409.06411): the weight of a completion's tokens after the first min(n_c, n_r).

    The S numbers are summed in fp64, which costs nothing here, and rounded once. So a sum of thousands of terms is as
    exact as the output dtype allows. Each segment is reduced by itself, in a fixed order. So results are the same from
    run to run, on CUDA too, where scattered adds are not.
    """
    assert token_logps.ndim == 1 and segments.shape == token_logps.shape, (token_logps.shape, segments.shape)
    values = token_logps.double()
    if ld_alpha is not None:
        values = values * ld_token_weights(segments, num_pairs, lengths, ld_alpha)
    return segment_sums(values, segments, num_pairs).to(token_logps.dtype)


def ld_token_weights(segments: Tensor, num_pairs: int, lengths: Tensor, ld_alpha: float) -> Tensor:
    """LD-DPO's factors of token log-probs, fp64 [S]: 1 for the first min(n_c, n_r) tokens, ld_alpha for the rest."""
    assert lengths.shape == (num_pairs, 2), (lengths.shape, num_pairs)
    shared = lengths.min(dim=1).values.repeat_interleave(2)
    index_in_segment = torch.arange(segments.numel(), device=segments.device)
    index_in_segment = index_in_segment - _segment_starts(segments, 2 * num_pairs)[:-1][segments]
    weights = torch.ones(segments.shape, dtype=torch.float64, device=segments.device)
    return weights.masked_fill_(index_in_segment >= shared[segments], ld_alpha)


@torch.no_grad()
def wpo_weights(token_logps: Tensor, log_sum_p2: Tensor, segments: Tensor, num_pairs: int) -> Tensor:
    """WPO's weights w_c * w_r, w = exp(mean_t [log p_t - log sum_v p_v^2]) (arXiv 2406.11827, eq. 2).

    token_logps, log_sum_p2: [S]; the second is a by-product of `dpo_scale.logprobs.token_logps`.
    segments: as in `sum_token_logps`. Returns [num_pairs], detached. A completion without tokens has w = 1.
    """
    counts = _segment_starts(segments, 2 * num_pairs).diff().clamp(min=1).view(num_pairs, 2)
    sums = segment_sums(token_logps.double() - log_sum_p2.double(), segments, num_pairs)
    return torch.exp((sums / counts).sum(1)).to(token_logps.dtype)


def _segment_starts(segments: Tensor, num_segments: int) -> Tensor:
    """[num_segments + 1] offsets: segment k is the run [starts[k], starts[k+1]) of tokens, maybe empty."""
    return torch.searchsorted(segments, torch.arange(num_segments + 1, device=segments.device, dtype=segments.dtype))


def segment_sums(values: Tensor, segments: Tensor, num_pairs: int) -> Tensor:
    """[num_pairs, 2] sums of values [S] over the runs that ascending segments [S] name."""
    counts = _segment_starts(segments, 2 * num_pairs).diff()
    # unsafe: the check that the counts add up to S, true by construction, makes the host wait for the GPU.
    sums = torch.segment_reduce(values, "sum", lengths=counts, unsafe=True, initial=0.0)
    return sums.view(num_pairs, 2)
