"""Every loss in whole runs on 2 ranks with unequal numbers of pairs, against plain torch over the full global batch.

11 pairs in batches of 5, 5 and 1: with micro-batches of 2 the ranks hold 2 and 1, then 1 and 1 pairs, and in the third
step one rank has but a filler. The plain side (`plain_dpo`) sees a batch at once, so what is proved beside the formulas
is that neither ranks, micro-steps nor fillers enter a loss or its gradient. The reference is not the policy, so that
no loss starts at its trivial point: a near one where values must not saturate, a far one where they are sorted.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from plain_dpo import read_pairs, train
from tiny import launch, preference_rows, read_metrics, save_model, write_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PAIRS, BATCH, STEPS, LEARNING_RATE = 11, 5, 3, 1e-3
BETA, SMOOTHING, TAU, GAMMA, LAMBDA, CPO_ALPHA, LD_ALPHA, F_ALPHA = 0.3, 0.1, 0.5, 0.4, 0.7, 0.6, 0.3, 0.7


def ls(x):
    return F.logsigmoid(x.double())


def sig(x):
    return torch.sigmoid(x.double())


def ratios(batch, **options):
    s_c, s_r, r_c, r_r = (sums.double() for sums in batch.sums(**options))
    return s_c - r_c, s_r - r_r


def bd(batch, score=lambda ratio: ratio, **options):
    """beta * D, per pair."""
    l_c, l_r = ratios(batch, **options)
    return BETA * (score(l_c) - score(l_r))


def of_d(formula, score=lambda ratio: ratio):
    return lambda batch: formula(bd(batch, score)).mean()


def of_ratios(formula):
    """A loss of (b L_c, b L_r)."""
    return lambda batch: formula(*(BETA * ratio for ratio in ratios(batch))).mean()


def of_means(formula):
    """A loss of (s_c / n_c, s_r / n_r, L_c / n_c, L_r / n_r)."""

    def loss(batch):
        n_c, n_r = batch.lengths
        s_c, s_r, _, _ = batch.sums()
        l_c, l_r = ratios(batch)
        return formula(s_c / n_c, s_r / n_r, l_c / n_c, l_r / n_r).mean()

    return loss


def smoothed(x):
    return -(1 - SMOOTHING) * ls(x) - SMOOTHING * ls(-x)


def exo(x):
    return sig(x) * (ls(x) - math.log(1 - SMOOTHING)) + sig(-x) * (ls(-x) - math.log(SMOOTHING))


def discopop(x):
    m = sig(x / TAU)
    return -ls(x) * (1 - m) + torch.exp(-x) * m


def sft(batch):
    """The negative log-likelihood per chosen token of the whole batch."""
    return -sum(chosen.double().sum() for chosen, _ in batch.policy) / sum(len(chosen) for chosen, _ in batch.policy)


def cpo(batch):
    s_c, s_r, _, _ = batch.sums()
    return (-ls(BETA * (s_c - s_r)) - CPO_ALPHA * s_c / batch.lengths[0]).mean()


def wpo(batch):
    weights = [
        torch.exp(sum((logps.detach() - p2).mean() for logps, p2 in zip(pair, p2s, strict=True)))
        for pair, p2s in zip(batch.policy, batch.log_sum_p2, strict=True)
    ]
    return (torch.stack(weights) * -ls(bd(batch))).mean()


def ld(batch):
    """Of a completion's tokens, those beyond the pair's shorter one count LD_ALPHA."""
    return -ls(bd(batch, weigh=lambda p, shared: torch.cat([p[:shared], LD_ALPHA * p[shared:]]))).mean()


def over_micro_steps(loss_of_pairs, micro_batch_size):
    """A loss of all pairs of a micro-step: the longest pairs first, nearly equal numbers on the 2 ranks."""
    sizes = {(5, 2): (3, 2), (5, 1): (2, 2, 1), (1, 2): (1,), (1, 1): (1,)}

    def loss(batch):
        order = sorted(range(len(batch.indices)), key=lambda i: (-batch.longest[i], i))
        s_c, s_r, r_c, r_r = batch.sums()
        total, start = 0, 0
        for size in sizes[len(order), micro_batch_size]:
            pairs = order[start : start + size]
            total, start = total + loss_of_pairs(s_c[pairs], s_r[pairs], r_c[pairs], r_r[pairs]).sum(), start + size
        assert start == len(order)
        return total / len(order)

    return loss


def aot(s_c, s_r, r_c, r_r):
    return smoothed(BETA * ((s_c - s_r).sort().values - (r_c - r_r).sort().values))


def aot_unpaired(s_c, s_r, r_c, r_r):
    return smoothed(BETA * ((s_c - r_c).sort().values - (s_r - r_r).sort().values))


def log_odds(mean):
    return mean - torch.log1p(-torch.exp(mean.double()))


SMOOTHED = [f"loss.label_smoothing={SMOOTHING}"]
MICRO_1 = ["train.micro_batch_size=1"]
CASES = {  # name: (loss_type, further overrides, the loss of a whole batch)
    "sigmoid": ("sigmoid", [], of_d(lambda x: -ls(x))),
    "cdpo": ("sigmoid", SMOOTHED, of_d(smoothed)),
    "robust": (
        "robust", SMOOTHED,
        of_d(lambda x: (-(1 - SMOOTHING) * ls(x) + SMOOTHING * ls(-x)) / (1 - 2 * SMOOTHING)),
    ),
    "hinge": ("hinge", [], of_d(lambda x: (1 - x).clamp(min=0))),
    "exo_pair": ("exo_pair", SMOOTHED, of_d(exo)),
    "discopop": ("discopop", [f"loss.discopop_tau={TAU}"], of_d(discopop)),
    "forward_kl": ("sigmoid", ["loss.f_divergence=forward_kl"], of_d(lambda x: -ls(x), lambda x: 1 - torch.exp(-x))),
    "js": ("hinge", ["loss.f_divergence=js"], of_d(lambda x: (1 - x).clamp(min=0), lambda x: math.log(2) + ls(x))),
    "alpha": (
        "sigmoid", ["loss.f_divergence=alpha", f"loss.f_alpha_divergence_coef={F_ALPHA}"],
        of_d(lambda x: -ls(x), lambda x: (torch.exp((F_ALPHA - 1) * x) - 1) / (F_ALPHA - 1)),
    ),
    "nca_pair": ("nca_pair", [], of_ratios(lambda c, r: -ls(c) - 0.5 * ls(-c) - 0.5 * ls(-r))),
    "bco_pair": ("bco_pair", [], of_ratios(lambda c, r: -ls(c) - ls(-r))),
    "sppo_hard": ("sppo_hard", [], of_ratios(lambda c, r: ((c - 0.5) ** 2 + (r + 0.5) ** 2) / BETA**2)),
    "apo_zero": ("apo_zero", [], of_ratios(lambda c, r: 1 - sig(c) + sig(r))),
    "apo_down": ("apo_down", [], of_ratios(lambda c, r: sig(c) + 1 - sig(c - r))),
    "ipo": ("ipo", [], of_means(lambda s_c, s_r, l_c, l_r: (l_c - l_r - 0.5 / BETA) ** 2)),
    "sigmoid_norm": ("sigmoid_norm", [], of_means(lambda s_c, s_r, l_c, l_r: -ls(BETA * (l_c - l_r)))),
    "simpo": (
        "simpo", [f"loss.simpo_gamma={GAMMA}"],
        of_means(lambda s_c, s_r, l_c, l_r: -ls(BETA * (s_c - s_r) - GAMMA)),
    ),
    "orpo": (
        "orpo", [f"loss.orpo_lambda={LAMBDA}"],
        of_means(lambda s_c, s_r, l_c, l_r: -s_c - LAMBDA * ls(log_odds(s_c) - log_odds(s_r))),
    ),
    "cpo": ("cpo", [f"loss.cpo_alpha={CPO_ALPHA}"], cpo),
    "sft": ("sft", [], sft),
    "sigmoid_and_sft": (
        "[sigmoid, sft]", ["loss.loss_weights=[1.0, 0.2]"],
        lambda batch: -ls(bd(batch)).mean() + 0.2 * sft(batch),
    ),
    "ld_alpha": ("sigmoid", [f"loss.ld_alpha={LD_ALPHA}"], ld),
    "use_weighting": ("sigmoid", ["loss.use_weighting=true"], wpo),
    "aot": ("aot", SMOOTHED, over_micro_steps(aot, 2)),
    "aot_unpaired": ("aot_unpaired", SMOOTHED, over_micro_steps(aot_unpaired, 2)),
    # 5 pairs in micro-batches of 1 leave one rank with a filler beside a real pair
    "aot_filler": ("aot", [*SMOOTHED, *MICRO_1], over_micro_steps(aot, 1)),
    "aot_unpaired_filler": ("aot_unpaired", [*SMOOTHED, *MICRO_1], over_micro_steps(aot_unpaired, 1)),
    "sigmoid_and_sft_filler": (
        "[sigmoid, sft]", ["loss.loss_weights=[1.0, 0.2]", *MICRO_1],
        lambda batch: -ls(bd(batch)).mean() + 0.2 * sft(batch),
    ),
}  # fmt: skip
POLICY_ONLY = {"simpo", "orpo", "cpo", "sft"}
SORTED = {name for name in CASES if name.startswith("aot")}


def reference_of(name):
    return "far" if name in SORTED else "near"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with all runs on 2 ranks (`<case>/`), and on 1 rank those that are alike there (`<case>-1/`)."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("zoo")
    save_model(folder / "policy")
    save_model(folder / "far", seed=1)
    save_model(folder / "near")
    torch.manual_seed(1)
    near = AutoModelForCausalLM.from_pretrained(folder / "near")
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    near.save_pretrained(folder / "near")
    write_rows(folder / "train.jsonl", preference_rows(PAIRS))
    common = [
        f"model.path={folder / 'policy'}", "model.dtype=float32", f"data.train={folder / 'train.jsonl'}",
        f"data.cache_dir={folder / 'cache'}", f"loss.beta={BETA}", f"train.max_steps={STEPS}",
        f"train.global_batch_size={BATCH}", "train.shuffle=false", f"train.learning_rate={LEARNING_RATE}",
        "checkpoint.save_at_end=false",
    ]  # fmt: skip
    for ranks, suffix, micro in ((2, "", 2), (1, "-1", 3)):
        jobs = []
        for number, (name, (loss_type, further, _)) in enumerate(CASES.items()):
            if ranks == 1 and (name in SORTED or "filler" in name):
                continue
            own = [*common, f"train.micro_batch_size={micro}", *further, f"loss.loss_type={loss_type}"]
            if name not in POLICY_ONLY:
                own.append(f"reference.model={folder / reference_of(name)}")
            jobs.append({"overrides": [*own, f"deepspeed.stage={number % 4}", f"output_dir={folder / name}{suffix}"]})
        (folder / "jobs.json").write_text(json.dumps(jobs))
        done = launch("tests/distributed/run_many.py", folder / "jobs.json", ranks=ranks)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_whole_batch_at_once(folder, name):
    pairs = read_pairs(folder / "train.jsonl", folder / "policy")
    plain = train(
        folder / "policy", folder / reference_of(name), pairs, CASES[name][2],
        steps=STEPS, batch_size=BATCH, learning_rate=LEARNING_RATE,
    )  # fmt: skip
    records = read_metrics(folder / name)
    # the first step has seen no update, and so no rounding that updates carry on
    assert records[0]["loss"] == pytest.approx(plain.losses[0], rel=3e-6)
    assert [r["loss"] for r in records] == pytest.approx(plain.losses, rel=2e-5)
    assert [r["grad_norm"] for r in records] == pytest.approx(plain.grad_norms, rel=1e-4)
    assert [r["pairs"] for r in records] == [5, 10, 11]


@pytest.mark.parametrize("name", [name for name in CASES if name not in SORTED and "filler" not in name])
def test_one_rank_gives_the_losses_of_two(folder, name):
    for one, two in zip(read_metrics(folder / f"{name}-1"), read_metrics(folder / name), strict=True):
        for metric in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert one[metric] == pytest.approx(two[metric], rel=2e-5, abs=2e-5), (one["step"], metric)


def test_each_loss_of_a_sum_is_reported(folder):
    for name in ("sigmoid_and_sft", "sigmoid_and_sft_filler"):
        alone = read_metrics(folder / "sigmoid")[0]["loss"], read_metrics(folder / "sft")[0]["loss"]
        first = read_metrics(folder / name)[0]
        assert (first["loss/sigmoid"], first["loss/sft"]) == pytest.approx(alone, rel=1e-6)
        assert first["loss"] == pytest.approx(alone[0] + 0.2 * alone[1], rel=1e-6)


def test_sorting_is_over_the_pairs_of_a_micro_step(folder):
    """Other micro-steps, other neighbours in the sorted order: were nothing reordered, these would be alike."""
    for name in ("aot", "aot_unpaired"):
        losses = [read_metrics(folder / case)[0]["loss"] for case in (name, f"{name}_filler")]
        assert losses[0] != pytest.approx(losses[1], rel=0.01)
