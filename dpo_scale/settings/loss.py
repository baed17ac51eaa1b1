"""What can be said about a preference loss, apart from torch, ranks and files (see `dpo_scale.losses`).

`LossSettings` is the `loss:` section of a config. It keeps the names that users of TRL know. `LOSSES` says what
each loss needs: whether a reference model is loaded, whether the loss may be taken pair by pair. So a new loss is
one row here and one function in `dpo_scale.losses` (docs/extending.md). Torch is not imported: a config can be
read and refused, and `--help` printed, without waiting for it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal, NoReturn

from dpo_scale.errors import ConfigError
from dpo_scale.settings.fields import Setting, setting


@dataclass(frozen=True)
class LossInfo:
    """What one loss needs, and where it comes from.

    needs_reference: it reads the reference model's log-probs.
    separable: a pair's loss depends on that pair alone; if not, all pairs of a micro-step are needed at once.
    of_d: it reads the log-ratios only through D = score(L_c) - score(L_r), so an f-divergence can replace D.
    per_token_rewards: without a reference, its rewards are logged per token: b * s / n.
    smoothing: which values of `label_smoothing` it takes, and why.
    reads: the optional settings that it reads; giving one to losses that do not read it is refused.
    """

    source: str
    needs_reference: bool = True
    separable: bool = True
    of_d: bool = False
    per_token_rewards: bool = False
    smoothing: Setting = Setting("")
    reads: tuple[str, ...] = ()


_SMOOTHED = ("label_smoothing",)

LOSSES: dict[str, LossInfo] = {
    "sigmoid": LossInfo("DPO, arXiv 2305.18290; cDPO, E. Mitchell's note", of_d=True, reads=_SMOOTHED),
    "robust": LossInfo(
        "robust DPO, arXiv 2403.00409",
        of_d=True,
        smoothing=Setting("divides by 1 - 2 * label_smoothing", below=0.5),
        reads=_SMOOTHED,
    ),
    "hinge": LossInfo("SLiC, arXiv 2305.10425", of_d=True),
    "ipo": LossInfo("IPO, arXiv 2310.12036"),
    "exo_pair": LossInfo(
        "EXO, arXiv 2402.00856",
        of_d=True,
        smoothing=Setting("takes its logarithm, e.g. of 0.001", above=0),
        reads=_SMOOTHED,
    ),
    "nca_pair": LossInfo("NCA, arXiv 2402.05369"),
    "bco_pair": LossInfo("BCO, arXiv 2404.04656"),
    "sppo_hard": LossInfo("SPPO, arXiv 2405.00675"),
    "aot": LossInfo("AOT, arXiv 2406.05882", separable=False, reads=_SMOOTHED),
    "aot_unpaired": LossInfo("AOT, arXiv 2406.05882", separable=False, reads=_SMOOTHED),
    "apo_zero": LossInfo("APO, arXiv 2408.06266"),
    "apo_down": LossInfo("APO, arXiv 2408.06266"),
    "discopop": LossInfo("DiscoPOP, arXiv 2406.08414", of_d=True, reads=("discopop_tau",)),
    "sigmoid_norm": LossInfo("length-normalised DPO, arXiv 2411.15124"),
    "sft": LossInfo("RPO, arXiv 2404.19733", needs_reference=False),
    "simpo": LossInfo("SimPO, arXiv 2405.14734", needs_reference=False, per_token_rewards=True, reads=("simpo_gamma",)),
    "orpo": LossInfo("ORPO, arXiv 2403.07691", needs_reference=False, per_token_rewards=True, reads=("orpo_lambda",)),
    "cpo": LossInfo("CPO, arXiv 2401.08417", needs_reference=False, reads=("cpo_alpha",)),
}

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


@dataclass
class LossSettings:
    """What is minimised. Formulas: docs/losses.md and the functions of `dpo_scale.losses`."""

    loss_type: str | list[str] = setting("sigmoid", "name of a loss, or a list of names for a weighted sum")
    loss_weights: list[float] | None = setting(None, "one weight per loss of the list; null: 1.0 each")
    beta: float = setting(0.1, "strength of the pull towards the reference; scales the logged rewards too", above=0)
    label_smoothing: float = setting(0.0, "assumed share of swapped labels", at_least=0, below=1)
    f_divergence: Divergence = setting("reverse_kl", "divergence from the reference; for losses of D (docs/losses.md)")
    f_alpha_divergence_coef: float = setting(0.5, "alpha of `f_divergence: alpha`")
    ld_alpha: float | None = setting(
        None,
        "LD-DPO's weight of tokens beyond the shorter completion's length; null: all weigh 1",
        at_least=0,
        at_most=1,
    )
    use_weighting: bool = setting(False, "WPO's weighting of pairs by how likely the policy itself was to write them")
    discopop_tau: float = setting(0.05, "DiscoPOP's temperature of the blend of its two losses", above=0, at_most=1)
    simpo_gamma: float = setting(0.5, "SimPO's margin between the mean log-probs of chosen and rejected, times beta")
    orpo_lambda: float = setting(0.1, "ORPO's weight of the odds ratio beside the likelihood", at_least=0)
    cpo_alpha: float = setting(1.0, "CPO's weight of the likelihood of the chosen completion", at_least=0)
    router_aux_loss_coef: float | None = setting(
        None,
        "weight of the router's balancing loss, for a mixture of experts; null: the model's own if its config says "
        "output_router_logits, else 0",
        at_least=0,
    )

    @property
    def loss_types(self) -> list[str]:
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)

    @property
    def weights(self) -> list[float]:
        return [1.0] * len(self.loss_types) if self.loss_weights is None else list(self.loss_weights)

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses reads reference log-probs."""
        return any(LOSSES[name].needs_reference for name in self.loss_types)

    @property
    def needs_batch(self) -> bool:
        """Whether any of the losses must see all pairs of a micro-step, of all ranks, at once."""
        return not all(LOSSES[name].separable for name in self.loss_types)

    @property
    def is_pairwise(self) -> bool:
        """Whether a pair's loss is a function of its own (weighted) sums of log-probs, and of nothing else."""
        return not self.needs_batch and not self.use_weighting

    @property
    def metric_names(self) -> list[str]:
        """The names of the metrics that `dpo_scale.losses.preference_loss` returns under these settings."""
        names = ["loss"]
        if len(self.loss_types) > 1:
            names += [f"loss/{name}" for name in self.loss_types]
        names += [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
        names += [f"logps/{name}" for name in ("chosen", "rejected", "margins")]
        names += ["ref_logps/margins", "kl"] if self.needs_reference else []
        return [*names, "accuracy/policy"]

    def validate(self) -> None:
        """Raise `ConfigError` for the first loss that is unknown and the first setting that no chosen loss can take."""
        self._check_names_and_weights()
        self._check_smoothing()
        self._check_divergence()
        self._check_token_options()
        self._check_read()

    def _refuse(self, field: str, why: str) -> NoReturn:
        raise ConfigError(f"loss.{field} = {getattr(self, field)!r}: {why}")

    def _check_names_and_weights(self) -> None:
        names, weights = self.loss_types, self.loss_weights
        if not names:
            self._refuse("loss_type", f"give at least one of: {', '.join(LOSSES)}")
        for name in names:
            if name not in LOSSES:
                near = "".join(f"; did you mean {loss!r}?" for loss in difflib.get_close_matches(name, LOSSES, n=1))
                self._refuse("loss_type", f"unknown loss {name!r}{near}; known: {', '.join(LOSSES)}")
            if names.count(name) > 1:
                self._refuse("loss_type", f"{name!r} is given twice; give it once, with its weight")
        if weights is not None and len(weights) != len(names):
            self._refuse("loss_weights", f"expected {len(names)}, one weight per loss of loss.loss_type = {names}")
        if weights is not None and (min(weights) < 0 or not any(weights)):
            self._refuse("loss_weights", "expected weights of at least 0, and not all of them 0")

    def _check_smoothing(self) -> None:
        for name in self.loss_types:
            taken = LOSSES[name].smoothing
            if not taken.allows(self.label_smoothing):
                self._refuse("label_smoothing", f"{name} {taken.meaning}: expected {taken.expected('a number')}")

    def _check_divergence(self) -> None:
        alpha_given = self.f_alpha_divergence_coef != type(self).f_alpha_divergence_coef
        if alpha_given and self.f_divergence != "alpha":
            self._refuse("f_alpha_divergence_coef", "is read only with loss.f_divergence = 'alpha'")
        if self.f_divergence == "alpha" and self.f_alpha_divergence_coef == 1:
            self._refuse("f_alpha_divergence_coef", "1 is the limit reverse_kl: set loss.f_divergence to that")
        if self.f_divergence == "reverse_kl":
            return
        of_d = [name for name, info in LOSSES.items() if info.of_d]
        others = [name for name in self.loss_types if LOSSES[name].needs_reference and name not in of_d]
        if others or not self.needs_reference:
            named = ", ".join(others or self.loss_types)
            self._refuse("f_divergence", f"has no meaning for {named}; it can be used with: {', '.join(of_d)}")

    def _check_token_options(self) -> None:
        policy_only = ", ".join(name for name in self.loss_types if not LOSSES[name].needs_reference)
        if self.ld_alpha is not None and policy_only:
            self._refuse("ld_alpha", f"would also reweight the likelihood that {policy_only} maximises; leave it out")
        if self.use_weighting and self.needs_batch:
            named = ", ".join(name for name in self.loss_types if not LOSSES[name].separable)
            self._refuse("use_weighting", f"{named} sorts values over pairs, so a pair's weight has no place there")

    def _check_read(self) -> None:
        """Refuse what was set but would change nothing: a typo in `loss_type` must not pass for a result."""
        read = {field for name in self.loss_types for field in LOSSES[name].reads}
        for field in sorted({field for info in LOSSES.values() for field in info.reads} - read):
            default = getattr(type(self), field)
            if getattr(self, field) != default:
                readers = [name for name, info in LOSSES.items() if field in info.reads]
                named = ", ".join(self.loss_types)
                self._refuse(field, f"{named} does not read it ({', '.join(readers)} would); leave it at {default!r}")
