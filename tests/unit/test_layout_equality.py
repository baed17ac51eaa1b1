"""A pair's log-probs and gradients are those of separate unpadded sequences, in every layout and attention back end.

The yardstick is the plain transformers model with its own attention, one sequence at a time, in fp32.
"""

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
import torch.nn.functional as F
import varlen_kernels
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dpo_scale.data.dataset import Pair
from dpo_scale.data.layout import make_batch
from dpo_scale.errors import ModelError
from dpo_scale.models import attention, varlen_attention
from dpo_scale.models.activations import compile_layers
from dpo_scale.models.attention import AttentionPlan
from dpo_scale.models.attention_backends import BACKENDS, attention_function, use_attention
from dpo_scale.models.flex_attention import BLOCK, block_mask
from dpo_scale.models.load import switch_off_dropout
from dpo_scale.models.scorer import PairScorer

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3", "mistral", "gpt_oss"]
# prompt, chosen, rejected: prompts and completions of one token, long beside short, longer than the windows of 16
SIZES = [(1, 1, 1), (24, 3, 30), (1, 40, 2), (7, 1, 1), (40, 12, 9), (3, 2, 50)]


def pairs_of(sizes=SIZES):
    draw = np.random.default_rng(0)
    return [Pair(*(draw.integers(0, 384, n) for n in of_pair), b"", i) for i, of_pair in enumerate(sizes)]


def make_model(architecture):
    torch.manual_seed(0)
    config = tiny_config(architecture)
    switch_off_dropout(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)  # attention far from uniform, so that a wrong mask shows
            else:  # biases and sinks, which begin as zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def coefficients(count):
    return torch.randn(count, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def separate(request):
    """(architecture, log-probs [S], {parameter: gradient}) of the plain model on one sequence at a time."""
    model, logps = make_model(request.param), []
    for pair in pairs_of():
        for completion in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, completion]))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1]
            logps.append(logits.float().log_softmax(-1).gather(1, torch.from_numpy(completion)[:, None])[:, 0])
    together = torch.cat(logps)
    (together * coefficients(len(together))).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return request.param, together.detach(), gradients


def scored(architecture, layout, backend, sizes=SIZES, checkpointing=False):
    model = make_model(architecture)
    if backend is not None:
        use_attention(model, backend)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    scorer = PairScorer(model)
    batch = make_batch(layout, pairs_of(sizes), np.ones(len(sizes)), pad_token_id=5)
    return model, scorer(**batch.scorer_inputs)


def close(got, expected):
    scale = max(1.0, expected.abs().max().item())
    return (got - expected).abs().max().item() <= 1e-5 * scale


def check(separate, layout, backend, checkpointing=False):
    architecture, expected, gradients = separate
    model, logps = scored(architecture, layout, backend, checkpointing=checkpointing)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    (logps * coefficients(len(logps))).sum().backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert close(ours[name], gradient), (name, (ours[name] - gradient).abs().max())


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_blocks_give_separate_sequences_log_probs_and_gradients(separate, layout):
    check(separate, layout, "blocks")


def test_padded_rows_give_separate_sequences_log_probs_and_gradients(separate):
    check(separate, "padded", None)


def test_runs_of_few_queries_change_nothing(separate, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 7)
    check(separate, "shared_prefix", "blocks")


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("kernel", varlen_kernels.KERNELS)
def test_variable_length_kernels_give_them_too(separate, kernel, layout, monkeypatch):
    monkeypatch.setattr(varlen_attention, "DTYPES", (torch.float32,))  # so that no rounding hides a mistake
    check(separate, layout, varlen_kernels.install(monkeypatch, kernel))


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_flex_attention_gives_separate_sequences_log_probs_and_gradients(separate, layout, monkeypatch):
    """Through torch's own plain form of it, which has a backward pass, though FlexAttention refuses that on a CPU."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    check(separate, layout, "flex")


def test_gradient_checkpointing_computes_the_same_row_again(separate):
    check(separate, "shared_prefix", "blocks", checkpointing=True)


def without_branches(plan):
    plan.segments = tuple((tokens, 0) for tokens, _ in plan.segments)


def one_document(plan):
    plan.segments = ((sum(tokens for tokens, _ in plan.segments), 0),)


@pytest.mark.parametrize("mistake", [without_branches, one_document])
def test_a_wrong_plan_is_far_from_right(separate, mistake, monkeypatch):
    architecture, expected, _ = separate
    right = AttentionPlan.__init__

    def wrong(plan, *arguments):
        right(plan, *arguments)
        mistake(plan)

    monkeypatch.setattr(AttentionPlan, "__init__", wrong)
    with torch.no_grad():
        _, logps = scored(architecture, "shared_prefix", "blocks")
    assert (logps - expected).abs().max() > 0.01


@pytest.mark.parametrize("separate", ["gemma2", "gemma3", "mistral", "gpt_oss"], indirect=True)
def test_a_lost_window_is_far_from_right(separate, monkeypatch):
    architecture, expected, _ = separate
    right = AttentionPlan.runs
    monkeypatch.setattr(AttentionPlan, "runs", lambda plan, queries, keys, window: right(plan, queries, keys, None))
    with torch.no_grad():
        _, logps = scored(architecture, "shared_prefix", "blocks")
    assert (logps - expected).abs().max() > 0.01


def allowed_pairs(plan, window):
    """The mask rule, pair by pair."""
    d, b, p = plan.document_ids, plan.branch_ids, plan.position_ids
    same_branch = (b[None] == 0) | (b[None] == b[:, None])
    allowed = (d[:, None] == d[None]) & same_branch & (p[None] <= p[:, None])
    return allowed if window is None else allowed & (p[:, None] - p[None] < window)


@pytest.mark.parametrize("window", [None, 100, 400])
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_flex_skips_only_empty_blocks_and_calls_only_full_ones_full(layout, window):
    sizes = [(300, 500, 420), (5, 3, 2), (90, 40, 30), (200, 700, 150), (1, 900, 1)]
    batch = make_batch(layout, pairs_of(sizes), np.ones(len(sizes)), pad_token_id=0)
    plan = AttentionPlan(batch.position_ids, batch.document_ids, batch.branch_ids, batch.segments)
    allowed = allowed_pairs(plan, window)
    mask = block_mask(plan, window)

    index = torch.arange(len(plan.position_ids))
    told = mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None])
    assert torch.equal(told, allowed)

    count = -(-len(index) // BLOCK)
    missing = count * BLOCK - len(index)
    blocks = F.pad(allowed, (0, missing, 0, missing)).view(count, BLOCK, count, BLOCK).transpose(1, 2)
    kinds = {}
    for kind, numbers, columns in (
        ("partial", mask.kv_num_blocks, mask.kv_indices),
        ("full", mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        kinds[kind] = torch.zeros(count, count, dtype=torch.bool)
        for row in range(count):
            kinds[kind][row, columns[0, 0, row, : numbers[0, 0, row]].long()] = True
    assert not (kinds["partial"] & kinds["full"]).any()
    assert blocks[kinds["full"]].all()
    assert kinds["full"].any() == (window is None or window > 2 * BLOCK)
    assert not blocks[~(kinds["partial"] | kinds["full"])].any()
    # bounds of ids see nearly all that is empty or full
    empty = ~blocks.flatten(2).any(-1)
    assert (kinds["partial"] & empty).sum() <= 0.15 * count * count
    assert (kinds["partial"] & blocks.flatten(2).all(-1)).sum() <= count


def test_the_mask_of_a_branch_is_not_larger_than_the_branch(monkeypatch):
    seen = []
    plain = F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **settings):
        seen.append(None if attn_mask is None else tuple(attn_mask.shape))
        return plain(q, k, v, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        scored("llama", "shared_prefix", "blocks", sizes=[(30, 20, 10), (8, 4, 6)])
    assert seen == [None, (10, 40), None, (6, 14)] * 2


def test_a_window_is_read_from_as_few_keys_as_it_holds(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    shapes = []
    plain = F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **settings):
        shapes.append(None if attn_mask is None else tuple(attn_mask.shape))
        return plain(q, k, v, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        scored("mistral", "packed", "blocks", sizes=[(30, 2, 1)])
    # a run of 8 queries sees its own 8 keys and the 15 before them, under a window of 16
    assert shapes == [(8, 8), (8, 16), (8, 23), (8, 23), (8, 8), (8, 16), (8, 23), (7, 22)] * 2


def test_a_model_that_keeps_the_plan_to_itself_is_refused():
    model = make_model("llama")
    use_attention(model, "blocks")
    with pytest.raises(ModelError, match="do not reach this attention"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("mask", "settings", "message"),
    [
        (torch.ones(1, 1, 4, 4), {}, "a mask of its own"),
        (None, {"position_bias": torch.ones(1, 1, 4, 4)}, "position_bias of its own"),
        (None, {"is_causal": False}, "not causal"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_with_terms_that_no_plan_knows_is_refused(mask, settings, message, backend, monkeypatch):
    varlen_kernels.install(monkeypatch, "flash-attn 2.8")
    batch = make_batch("packed", pairs_of([(1, 1, 1)]), np.ones(1), pad_token_id=0)
    plan = AttentionPlan(batch.position_ids, batch.document_ids, batch.branch_ids, batch.segments)
    q = torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=message):
        attention_function(backend)(torch.nn.Linear(1, 1), q, q, q, mask, attention_plan=plan, **settings)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_compiled_layers_agree_and_are_not_compiled_again_for_other_pairs(architecture):
    models = [make_model(architecture), make_model(architecture)]
    for model in models:
        use_attention(model, "blocks")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(models[1], backend="aot_eager")
    plain, compiled = (PairScorer(model).train() for model in models)
    graphs = []
    for sizes in (SIZES[:3], SIZES, SIZES[1:2], SIZES[::-1]):
        inputs = make_batch("shared_prefix", pairs_of(sizes), np.ones(len(sizes)), pad_token_id=5).scorer_inputs
        assert close(compiled(**inputs), plain(**inputs))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1]
