"""The balancing loss of a mixture of experts is transformers' own of each completion by itself, whatever the layout."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_config
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpo_scale.data.dataset import Pair
from dpo_scale.data.layout import Runs, make_batch
from dpo_scale.errors import ConfigError
from dpo_scale.losses import preference_loss
from dpo_scale.models.activations import compile_layers, enable_checkpointing
from dpo_scale.models.attention_backends import use_attention
from dpo_scale.models.router import (
    SHARES,
    balance_of,
    has_router,
    resolve_router_loss,
    router_of,
    share_metrics,
    sum_over_runs,
)
from dpo_scale.models.scorer import PairScorer
from dpo_scale.observe.metrics import MetricSums
from dpo_scale.settings.loss import LossSettings
from dpo_scale.settings.tree import load_config
from dpo_scale.training.objective import across_ranks, from_logps, fused_by_pair

ARCHITECTURES = ["mixtral", "qwen3_moe", "qwen3_moe_with_a_dense_layer", "olmoe", "gpt_oss"]
LAYOUTS = ["padded", "packed", "shared_prefix"]
SIZES = [(1, 1, 1), (24, 3, 30), (1, 40, 2), (40, 12, 9)]
REFERENCE = torch.linspace(-90.0, -10.0, 2 * len(SIZES)).view(-1, 2)
MEAN_CHOSEN = 14.0
WEIGHTED = LossSettings(router_aux_loss_coef=0.3)


def pairs_of(sizes):
    draw = np.random.default_rng(0)
    return [Pair(*(draw.integers(0, 384, n) for n in of_pair), b"", i) for i, of_pair in enumerate(sizes)]


def make_model(architecture):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)  # far from uniform, so that a wrong mean shows
            else:  # biases and sinks, which begin as zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Policy:
    """What the objective sees of an engine."""

    def __init__(self, model):
        self.module = PairScorer(model)

    def __call__(self, *inputs, **named):
        return self.module(*inputs, **named)


def policy(architecture, layout, *, checkpointing=False):
    model = make_model(architecture)
    if layout != "padded":
        use_attention(model, "blocks")
    if checkpointing:
        enable_checkpointing(model, offload=False)
        model.train()
    return Policy(model)


def batch_of(layout, sizes=SIZES, weights=None):
    pairs = pairs_of(sizes)
    batch = make_batch(layout, pairs, np.ones(len(pairs)) if weights is None else np.array(weights), pad_token_id=5)
    return replace(batch, reference_logps=REFERENCE[: len(pairs)])


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def shares_of(logits, per_token):
    """[L, E] share of the tokens that each expert was given, counted token by token."""
    counts = torch.zeros(len(logits), logits[0].shape[1])
    for layer, of_layer in enumerate(logits):
        for token in of_layer:
            for expert in token.topk(per_token).indices.tolist():
                counts[layer, expert] += 1 / len(of_layer)
    return counts


@pytest.fixture(scope="module", params=ARCHITECTURES)
def separate(request):
    """(architecture, router's losses [P], shares [P, L, E], losses [P], gradients) of one sequence at a time."""
    model, router_losses, shares, logps = make_model(request.param), [], [], []
    config = model.config
    for pair in pairs_of(SIZES):
        for completion in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, completion]))[None]
            output = model(input_ids=ids, use_cache=False, output_router_logits=True)
            logits = output.logits[0, len(pair.prompt_ids) - 1 : -1]
            logps.append(logits.float().log_softmax(-1).gather(1, torch.from_numpy(completion)[:, None]).sum())
            experts = output.router_logits[0].shape[-1]
            router_losses.append(load_balancing_loss_func(output.router_logits, experts, config.num_experts_per_tok))
            torch.testing.assert_close(output.aux_loss, router_losses[-1])
            shares.append(shares_of(output.router_logits, config.num_experts_per_tok))
    of_pairs = torch.stack(router_losses).view(-1, 2).mean(1)
    lengths = torch.tensor(SIZES)[:, 1:]
    losses, _ = preference_loss(
        torch.stack(logps).view(-1, 2), REFERENCE, lengths, WEIGHTED, mean_chosen_tokens=MEAN_CHOSEN
    )
    total = (losses + 0.3 * of_pairs).sum()
    total.backward()
    shares = torch.stack(shares).view(len(SIZES), 2, *shares[0].shape).mean(1)
    return request.param, of_pairs.detach(), shares, (losses + 0.3 * of_pairs).detach(), gradients(model)


def check(separate, scorer, layout, objective):
    _, router_losses, shares, losses, expected = separate
    total, found, metrics = objective(scorer, batch_of(layout), WEIGHTED, MEAN_CHOSEN, (len(SIZES),))
    torch.testing.assert_close(metrics["router/aux_loss"], router_losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(metrics[SHARES], shares, atol=1e-6, rtol=1e-6)
    for reported in (found, metrics["loss"]):
        torch.testing.assert_close(reported, losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total, losses.sum(), atol=5e-5, rtol=1e-5)
    total.backward()
    ours = gradients(scorer.module.model)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item())
        assert (ours[name] - gradient).abs().max().item() <= 2e-5 * scale, name


@pytest.mark.parametrize("objective", [from_logps, fused_by_pair])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_shares_and_gradients_are_those_of_separate_sequences(separate, layout, objective):
    check(separate, policy(separate[0], layout), layout, objective)


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_checkpointing_changes_nothing(separate, layout):
    check(separate, policy(separate[0], layout, checkpointing=True), layout, from_logps)


def test_losses_that_sort_the_pairs_of_all_ranks_have_it_too():
    sorting = LossSettings(loss_type="aot", router_aux_loss_coef=0.3)
    results = {}
    for coefficient in (0.0, 0.3):
        scorer, batch = policy("mixtral", "packed"), batch_of("packed")
        settings = replace(sorting, router_aux_loss_coef=coefficient)
        total, losses, metrics = across_ranks(scorer, batch, settings, MEAN_CHOSEN, (len(SIZES),))
        total.backward()
        results[coefficient] = total.detach(), losses, metrics["router/aux_loss"], gradients(scorer.module.model)
    (plain, losses, router, _), (total, with_router, _, grads) = results[0.0], results[0.3]
    torch.testing.assert_close(total - plain, 0.3 * router.sum().detach())
    torch.testing.assert_close(with_router - losses, 0.3 * router.detach())
    assert torch.equal(metrics["loss"], with_router)
    weight = "model.layers.1.mlp.gate.weight"
    assert not torch.allclose(grads[weight], results[0.0][3][weight], atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_and_fillers_do_not_matter(layout):
    """Metrics of one micro-batch, and of three with a filler among them."""
    outcomes = []
    for parts in ([(SIZES, None)], [(SIZES[:1], None), ([*SIZES[1:3], SIZES[0]], [1, 1, 0]), (SIZES[3:], None)]):
        scorer, sums, first = policy("qwen3_moe", layout), MetricSums(), 0
        drawn = pairs_of(SIZES)
        for sizes, weights in parts:
            count = len(sizes) if weights is None else sum(weights)
            pairs = [*drawn[first : first + count], *drawn[: len(sizes) - count]]
            batch = make_batch(layout, pairs, np.ones(len(sizes)) if weights is None else np.array(weights), 5)
            batch = replace(batch, reference_logps=REFERENCE[: len(sizes)] * 0)
            total, losses, metrics = from_logps(scorer, batch, WEIGHTED, MEAN_CHOSEN, (count,))
            total.backward()
            sums.add({"loss": losses, **metrics}, batch.weights)
            first += count
        means, _, _ = sums.reduce().read()
        outcomes.append((share_metrics(means, scorer.module.router), gradients(scorer.module.model)))
    (once, grads), (thrice, others) = outcomes
    assert once == pytest.approx(thrice, abs=1e-5, rel=1e-5)
    for name, gradient in grads.items():
        torch.testing.assert_close(others[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


def test_a_coefficient_of_0_measures_without_gradient_and_without_moving_a_number():
    plain = policy("gpt_oss", "packed")
    expected = plain.module(**batch_of("packed").scorer_inputs)
    scorer, batch = policy("gpt_oss", "packed"), batch_of("packed")
    found, balance = scorer.module(**batch.scorer_inputs, router_runs=batch.runs)
    assert torch.equal(found, expected)
    assert not balance.loss.requires_grad and balance.loss.grad_fn is None
    settings = LossSettings(router_aux_loss_coef=0.0)
    _, losses, metrics = from_logps(scorer, batch, settings, MEAN_CHOSEN, (len(SIZES),))
    without, _ = preference_loss(
        torch.stack([part.sum() for part in expected.split(batch.lengths.flatten().tolist())]).view(-1, 2),
        REFERENCE, batch.lengths, settings, mean_chosen_tokens=MEAN_CHOSEN,
    )  # fmt: skip
    torch.testing.assert_close(losses, without)
    assert torch.equal(metrics["router/aux_loss"], balance.loss)


def test_nothing_is_recorded_unless_it_is_asked_for():
    """Not even where the model's own config asks for it in every pass; so references are left alone."""
    scorer = policy("olmoe", "padded").module
    scorer.model.config.output_router_logits = True
    seen = []
    scorer.model.model.register_forward_hook(lambda module, inputs, output: seen.append(output.router_logits))
    batch = batch_of("padded")
    scorer(**batch.scorer_inputs)
    scorer(**batch.scorer_inputs, router_runs=batch.runs)
    assert not seen[0] and len(seen[1]) == 2


def test_sums_of_slices_of_a_row_are_the_rows():
    """Each slice has its part of every run, perhaps none."""
    draw = torch.Generator().manual_seed(0)
    logits = [torch.randn(20, 6, generator=draw) for _ in range(3)]
    runs = Runs((4, 9, 0, 7), ((0, 1), (0, 3)))
    whole = balance_of(sum_over_runs(logits, runs.lengths, 2), runs)
    slices = [((4, 2, 0, 0), slice(0, 6)), ((0, 7, 0, 1), slice(6, 14)), ((0, 0, 0, 6), slice(14, 20))]
    parts = [sum_over_runs([each[tokens] for each in logits], lengths, 2) for lengths, tokens in slices]
    together = type(parts[0])(*(sum(values) for values in zip(*parts, strict=True)))
    for ours, theirs in zip(balance_of(together, runs), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_are_the_sequences_tokens(layout):
    batch, pairs = batch_of(layout), pairs_of(SIZES)
    parts = batch.input_ids.flatten().split(batch.runs.lengths)
    sequences = [torch.cat([parts[run] for run in runs]).tolist() for runs in batch.runs.sequences]
    expected = [[*p.prompt_ids, *ids] for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]
    assert sequences == [[int(token) for token in ids] for ids in expected]


def test_three_numbers_of_a_layer_by_hand():
    router = router_of(make_model("qwen3_moe_with_a_dense_layer"))
    means = {"loss": 0.5, SHARES: np.array([[1.0, 0.5, 0.5, 0.0]])}
    assert share_metrics(means, router) == {
        "loss": 0.5,
        "router/largest_share/layer_1": 1.0,
        "router/smallest_share/layer_1": 0.0,
        "router/entropy/layer_1": pytest.approx(1.5 * np.log(2)),  # of 1/2, 1/4, 1/4
    }


def test_means_of_arrays_come_beside_those_of_scalars():
    sums = MetricSums()
    weights = torch.tensor([1.0, 0.0, 1.0])
    values = torch.tensor([[[1.0, 2.0]], [[float("nan"), 9.0]], [[3.0, 6.0]]])
    sums.add({"b": torch.tensor([1.0, float("nan"), 2.0]), "a": values}, weights)
    sums.add({"b": torch.tensor([6.0]), "a": torch.tensor([[[5.0, 1.0]]])}, torch.tensor([1.0]))
    means, per_rank, more = sums.reduce(7.0).read(torch.tensor(4.0))
    assert means["b"] == 3.0 and means["a"].tolist() == [[3.0, 3.0]]
    assert per_rank.tolist() == [[7.0]] and more == [4.0]


def config_of(*overrides):
    return load_config(None, ["model.path=m", "data.train=t.jsonl", "data.eval_fraction=0.1", *overrides])


@pytest.mark.parametrize(
    ("override", "model_says", "expected"),
    [
        ("loss.router_aux_loss_coef=null", False, 0.0),
        ("loss.router_aux_loss_coef=null", True, 0.01),
        ("loss.router_aux_loss_coef=0", True, 0.0),
        ("loss.router_aux_loss_coef=0.2", False, 0.2),
    ],
)
def test_the_coefficient_is_the_models_own_where_it_is_not_given(override, model_says, expected):
    config, model_config = config_of(override), tiny_config("olmoe")
    model_config.output_router_logits = model_says
    resolve_router_loss(config, model_config)
    assert config.loss.router_aux_loss_coef == expected


@pytest.mark.parametrize(
    "override",
    [
        "loss.router_aux_loss_coef=0.2",
        "checkpoint.metric_for_best_model=router/aux_loss",
        "logging.console_metrics=[loss, router/aux_loss]",
    ],
)
def test_a_model_without_router_has_no_such_loss(override):
    config = config_of(override)
    resolve_router_loss(config, tiny_config("mixtral"))
    with pytest.raises(ConfigError) as refusal:
        resolve_router_loss(config, tiny_config("llama"))
    for part in (override.split("=")[0], "llama", "no router"):
        assert part in str(refusal.value)


def test_a_dense_model_of_a_mixtures_class_has_no_router():
    assert has_router(transformers.MixtralConfig()) and not has_router(transformers.MixtralConfig(num_local_experts=0))
    assert not has_router(SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_experts=8)))  # code of its own


def test_compiled_layers_record_the_same():
    scorer, batch = policy("mixtral", "padded"), batch_of("padded")
    expected = scorer.module(**batch.scorer_inputs, router_runs=batch.runs)[1]
    compile_layers(scorer.module.model, backend="eager")
    scorer.module.train()
    found = scorer.module(**batch.scorer_inputs, router_runs=batch.runs, router_gradient=True)[1]
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.loss.requires_grad
