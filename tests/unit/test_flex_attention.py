"""FlexAttention as a GPU would get it, without one: what torch makes of our call, how often, and what stops it.

That its values are right is in test_layout_equality.py.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex

from dpo_scale.data.layout import PROMPT
from dpo_scale.errors import ModelError
from dpo_scale.models import flex_attention as flex
from dpo_scale.models.attention import AttentionPlan

SCRIPT = Path(__file__).resolve().parents[1] / "lower_flex_attention.py"
SHARED_MEMORY = {"8.0": 163 * 1024, "9.0": 227 * 1024, "10.0": 227 * 1024}  # bytes that a block may have


def lower(tmp_path, *arguments):
    """The lines that tests/lower_flex_attention.py prints."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    caches = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    found = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment | caches, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def check(case):
    # rows of one token, of fewer than 128 and of more: forward and backward of training, and inference
    assert len(case["kernels"]) == 9, case
    for kernels in case["kernels"]:
        assert len(kernels) == 1 and "flex_attention" in kernels[0], case
    assert case["growth"] == 1, case


def test_llama_3s_heads_lower_for_an_h100_at_every_length(tmp_path):
    (case,) = lower(tmp_path, "9.0", "--cases", "1")
    assert case["heads"] == [32, 8] and case["width"] == 128
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "cases"), [("8.0", 3), ("9.0", 7), ("10.0", 2)])
def test_other_heads_widths_windows_soft_caps_and_sinks_lower_and_compile(gpu, cases, tmp_path):
    """Those of today's models. The whole product: python tests/lower_flex_attention.py 9.0 --all --compile."""
    found = lower(tmp_path, gpu, "--cases", str(cases), "--compile")
    assert len(found) == cases
    for case in found:
        check(case)
        assert max(case["shared"].values()) <= SHARED_MEMORY[gpu], case
        # for fp32 and wider heads blocks are torch's own choice, which spills as much with a plain causal mask
        usual = case["dtype"] == "bfloat16" and case["width"] <= 128
        for name, spilled in case["spilled"].items():
            assert spilled <= (4096 if not usual else 1024 if "backward" in name else 128), case


@pytest.mark.slow
def test_a_run_of_random_rows_stays_below_the_limit_of_compiled_forms(tmp_path):
    """Two windows, checkpoints computed again in another thread, frozen keys, evaluation, compiled layers."""
    (forms,) = lower(tmp_path, "9.0", "--rows", "50")
    expected = {"training": 6, "inference": 3}  # three lengths; keys with gradients or frozen
    assert forms == {
        f"flex_attention_window_{window}_softcap_None_{kind}": count
        for window in (None, 100)
        for kind, count in expected.items()
    }
    assert max(forms.values()) < torch._dynamo.config.recompile_limit


def plan_of(tokens):
    ids = torch.full((1, tokens), PROMPT, device="meta")
    return AttentionPlan(torch.arange(tokens, device="meta")[None], ids, ids, ((tokens, 0),))


@pytest.fixture
def attend(monkeypatch):
    """`flex_attention` on rows of so many tokens, on a device where it compiles, with torch's simplest backend."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    flex._compiled.cache_clear()
    torch._dynamo.reset()

    def call(tokens, window=None, softcap=None, plan=None):
        query, key, value = (torch.empty(1, heads, tokens, 16, device="meta") for heads in (4, 2, 2))
        layer, plan = SimpleNamespace(is_causal=True), plan or plan_of(tokens)
        output, _ = flex.flex_attention(
            layer, query, key, value, None, sliding_window=window, softcap=softcap, attention_plan=plan
        )
        assert output.shape == (1, tokens, 4, 16)

    yield call
    flex._compiled.cache_clear()
    torch._dynamo.reset()


@torch.no_grad()
def test_beyond_the_limit_of_compiled_forms_nothing_runs_unfused(attend):
    with torch._dynamo.config.patch(recompile_limit=1):
        attend(5)
        attend(9)  # the same form
        with pytest.raises(ModelError, match=r"its limit of compiled forms.*model.attn_implementation=sdpa"):
            attend(1)


@torch.no_grad()
def test_a_window_or_a_soft_cap_has_its_own_limit(attend):
    with torch._dynamo.config.patch(recompile_limit=1):
        for window, softcap in ((None, None), (3, None), (7, None), (None, 30.0), (3, 30.0)):
            attend(5, window, softcap)
            attend(9, window, softcap)


def test_with_compilation_switched_off_nothing_runs_unfused(attend):
    with torch.compiler.set_stance("force_eager"), pytest.raises(ModelError, match="is not compiled"):
        attend(5)


@torch.no_grad()
def test_layers_of_one_window_share_a_row_s_block_mask(attend, monkeypatch):
    windows = []
    derive = flex.block_mask
    monkeypatch.setattr(flex, "block_mask", lambda plan, window: windows.append(window) or derive(plan, window))
    plan = plan_of(5)
    for window in (None, 3, None, 3):
        attend(5, window, plan=plan)
    assert windows == [None, 3]
