"""The benchmarks themselves: what they count, what they compare with, what their tables say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "benchmarks"))  # where the scripts find each other

import logprob_arms  # noqa: E402
import logprob_report  # noqa: E402
import logprobs  # noqa: E402
import planning  # noqa: E402
import throughput_report  # noqa: E402
import zero3_hooks  # noqa: E402
from common import markdown_table, median_and_spread  # noqa: E402
from logprob_case import BETA, HEADS, Head, compute_exact, make_case, relative_error  # noqa: E402
from memory import extra_peak_bytes, peak_bytes  # noqa: E402

TINY = Head("tiny", 16, 160)
CAPPED = Head("capped", 16, 160, softcap=5.0)
KIB = 1024


def kib(count: int) -> torch.Tensor:
    return torch.empty(count * KIB, dtype=torch.uint8)


def test_peak_is_the_most_that_was_held_at_once():
    def work():
        first = kib(300)
        second = kib(500)  # 800 at once
        del first
        third = kib(200)  # 700
        del second, third
        kib(400)

    assert peak_bytes(work, "cpu") == 800 * KIB


def test_peak_counts_buffers_written_in_place_and_what_backward_saves():
    inputs = torch.rand(256, KIB // 4, requires_grad=True)  # 256 KiB

    def work():
        buffer = torch.empty(256, KIB // 4)  # 256
        torch.mul(inputs.detach(), 2, out=buffer)  # nothing new
        del buffer
        inputs.exp().exp().sum().backward()

    # Forward: each exp saves its result, 2 * 256. In backward both are alive when the sum's gradient, a view of one
    # number, becomes the gradient of the second exp's input, 256; the second result is then freed, and the gradient of
    # `inputs` takes its place.
    assert 768 * KIB <= peak_bytes(work, "cpu") <= 768 * KIB + 64


def test_extra_memory_leaves_out_the_gradients_that_remain():
    inputs = torch.rand(256, KIB // 4, requires_grad=True)
    inputs.grad = torch.ones_like(inputs)

    def work():
        held = kib(100)
        (2 * inputs).sum().backward()  # 256 for the product, which goes, then 256 for the gradient, which stays
        del held

    assert 100 * KIB <= extra_peak_bytes(work, [inputs], "cpu") <= 100 * KIB + 64
    assert extra_peak_bytes(lambda: None, [inputs], "cpu") == 0


@pytest.mark.parametrize("head", [TINY, CAPPED], ids=lambda head: head.name)
def test_exact_values_are_those_of_plain_autograd_in_fp64(head):
    case = make_case(head, 64, torch.float32, "cpu")
    hidden, weight = (t.double().requires_grad_() for t in (case.hidden, case.weight))
    logits = hidden @ weight.T
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logps = F.log_softmax(logits, 1)[torch.arange(64), case.targets]
    # One pair of 32 tokens a completion.
    loss = -F.logsigmoid(BETA * (logps[:32].sum() - logps[32:].sum()))
    loss.backward()

    exact = compute_exact(case)

    assert case.pairs == 1
    torch.testing.assert_close(exact.logps, logps.detach(), rtol=1e-12, atol=1e-12)
    assert exact.logit_size == pytest.approx(logits.abs().max().item(), rel=1e-12)
    assert relative_error(exact.hidden_grad, hidden.grad[exact.tokens]) < 1e-12
    assert relative_error(exact.weight_grad, weight.grad[exact.words]) < 1e-12


@pytest.mark.parametrize("tokens", [1, 3, 1536, 4100])
def test_tokens_that_make_no_whole_pairs_are_refused(tokens):
    with pytest.raises(ValueError, match=f"got {tokens}"):
        make_case(TINY, tokens, torch.float32, "cpu")


# Liger's DPO has its own order of tokens, which is the point of having it here.
@pytest.mark.parametrize("name", logprob_arms.ARMS)
@pytest.mark.parametrize("mode", logprob_arms.MODES)
@pytest.mark.parametrize("head", [TINY, CAPPED], ids=lambda head: head.name)
def test_every_arm_computes_the_same_loss_and_gradients(name, mode, head):
    case = make_case(head, 5 * 1024, torch.float32, "cpu")
    try:
        arm = logprob_arms.make_arm(name, case, mode)
    except logprob_arms.Absent as reason:
        pytest.skip(str(reason))
    with torch.compiler.set_stance("force_eager"):  # compiling would take longer than all other tests here
        output = arm.run()
    found = logprobs.errors(arm, output, case, compute_exact(case))
    assert found.pop("logp_error_of_sums") == (name in ("pair_loss", "liger_dpo", "liger_dpo_4"))
    expected = {"logp_error"}
    if mode != logprob_arms.FORWARD:
        expected.add("hidden_grad_error")
    if mode == logprob_arms.TRAIN:
        expected.add("weight_grad_error")
    assert found.keys() == expected
    assert max(found.values()) < 1e-4


def test_errors_see_a_wrong_gradient_and_a_wrong_log_prob():
    case = make_case(TINY, 64, torch.float32, "cpu")
    exact = compute_exact(case)
    arm = logprob_arms.make_arm("chunked", case, logprob_arms.TRAIN)
    output = arm.run()
    output.logps[7] += 0.01 * exact.logit_size
    arm.hidden.grad *= 1.01
    arm.weight.grad *= 1.02

    found = logprobs.errors(arm, output, case, exact)

    assert found["logp_error"] == pytest.approx(0.01, rel=1e-3)
    assert found["hidden_grad_error"] == pytest.approx(0.01, rel=1e-2)
    assert found["weight_grad_error"] == pytest.approx(0.02, rel=1e-2)


def row(arm, seconds, extra_bytes, mode=logprob_arms.TRAIN, **more):
    return {
        "head": "tiny",
        "tokens": 1000,
        "mode": mode,
        "arm": arm,
        "hidden_size": 100,
        "vocabulary": 5000,
        "softcap": None,
        "seconds": seconds,
        "extra_bytes": extra_bytes,
        "logp_error": 1e-7,
        "logp_error_of_sums": False,
        **more,
    }


def report_of(rows, left_out=()):
    return {
        "device": "An Accelerator 9000",
        "cores": 2,
        "load_before": 0.0,
        "date": "2025-01-31",
        "versions": {"torch": "2.11.0"},
        "dtype": "bfloat16",
        "on_gpu": False,
        "matmul_flops_per_second": 1e9,
        "rows": rows,
        "left_out": list(left_out),
    }


def test_ratios_are_to_the_best_naive_form_and_the_floor_counts_passes():
    rows = [
        row("log_softmax", [8.0, 6.0, 7.0], 4_000_000),
        row("logsumexp", [10.0], 2_000_000),
        row("compiled", [1.0], 1_000_000),  # a peer, not a form to compare with
        row("chunked", [5.0, 3.5, 9.0], 500_000),
        row("chunked", [2.0], 500_000, mode=logprob_arms.FORWARD),
    ]
    logprob_report.add_ratios(report_of(rows))

    ours, forward = rows[3], rows[4]
    assert ours["time"] == 5.0
    assert ours["spread"] == pytest.approx(5.5 / 5)
    assert ours["time_ratio"] == pytest.approx(5 / 7)
    assert ours["memory_ratio"] == pytest.approx(0.25)
    # 2 * 1000 * 100 * 5000 = 1e9 FLOPs a pass, 1 s at the rate above: 3 passes of 5 s, or 1 of 2 s.
    assert ours["floor_share"] == pytest.approx(0.6)
    assert forward["floor_share"] == pytest.approx(0.5)
    assert forward["time_ratio"] is None and forward["memory_ratio"] is None


def test_table_shows_what_was_measured_and_names_who_is_absent():
    rows = [
        row("log_softmax", [7.0], 40_000_000),
        row("chunked", [3.5], 10_000_000, hidden_grad_error=2e-3, weight_grad_error=3e-3),
        {"head": "tiny", "tokens": 1000, "mode": logprob_arms.TRAIN, "arm": "cce", "absent": "no wheel"},
    ]
    report = report_of(rows, [{"head": "Llama-3-8B", "tokens": 32768, "reason": "needs about 999 GB"}])
    logprob_report.add_ratios(report)
    text = logprob_report.table(report)

    assert "| ours, chunked | 3.50 s | 0% | 0.50 | 86% | 10 MB | 0.25 | 1e-07 | 2e-03 | 3e-03 |" in text
    assert "- Llama-3-8B, 32,768 tokens: left out, needs about 999 GB." in text
    assert "- cut-cross-entropy: absent: no wheel." in text


def test_summary_replaces_what_stands_between_the_markers(tmp_path):
    report = report_of([row("log_softmax", [7.0], 40_000_000), row("chunked", [3.5], 10_000_000)])
    logprob_report.add_ratios(report)
    (tmp_path / "results" / "device").mkdir(parents=True)
    (tmp_path / "results" / "device" / "logprobs.json").write_text(json.dumps(report))
    readme = tmp_path / "README.md"
    begin, end = logprob_report.MARKERS
    readme.write_text(f"before\n\n{begin}\nan old table\n{end}\nafter\n")

    logprob_report.update_readme(readme, tmp_path / "results")
    once = readme.read_text()
    logprob_report.update_readme(readme, tmp_path / "results")

    assert readme.read_text() == once
    assert once.startswith(f"before\n\n{begin}\n") and once.endswith(f"{end}\nafter\n")
    assert "old" not in once
    assert (
        "| tiny | 1,000 | forward + backward | chunked | 3.50 s | 0.50 | none here | 86% | 10 MB | 0.25 | 1e-07 |"
        in once
    )
    assert logprob_report.NO_GPU in once

    readme.write_text("no markers")
    with pytest.raises(ValueError, match="logprobs table"):
        logprob_report.update_readme(readme, tmp_path / "results")


def test_heads_by_name_and_by_size():
    assert logprobs.head_of("Gemma-2-2B") is HEADS["Gemma-2-2B"]
    assert logprobs.head_of("64x1000") == Head("64x1000", 64, 1000)


def test_the_command_measures_and_writes_table_json_and_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(logprobs, "MATMUL_SECONDS", 0.05)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(logprobs, "free_bytes", lambda device: 2 * 10**9)
    logprobs.main(
        ["--device", "cpu", "--shapes", "16x300", "40000x40000", "--tokens", "64", "--dtype", "float32"]
        + ["--implementations", "naive", "chunked", "liger_ce", "--repeats", "3", "--output", str(tmp_path)]
    )

    report = json.loads((tmp_path / "logprobs.json").read_text())
    measured = [r for r in report["rows"] if "seconds" in r]
    assert [(r["mode"], r["arm"]) for r in measured] == [
        (mode, arm) for mode in logprob_arms.MODES for arm in ("naive", "chunked")
    ]
    assert all(len(r["seconds"]) == 3 and r["logp_error"] < 1e-5 for r in measured)
    assert {r["arm"] for r in report["rows"] if "absent" in r} == {"liger_ce"}
    assert [left["head"] for left in report["left_out"]] == ["40000x40000"]
    assert "Liger, fused linear cross entropy: absent: " in (tmp_path / "logprobs.md").read_text()
    pytest.importorskip("matplotlib")
    assert (tmp_path / "logprobs-16x300.png").stat().st_size < 200_000


def test_an_unknown_head_is_named(capsys):
    with pytest.raises(SystemExit):
        logprobs.main(["--shapes", "Llama"])
    assert "'Llama' is neither one of SmolLM2-135M" in capsys.readouterr().err


def test_median_spread_and_table_rows():
    assert median_and_spread([4.0, 2.0, 3.0]) == (3.0, pytest.approx(2 / 3))
    assert markdown_table(("a", "b"), [("1", "2")]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]


def test_gpu_suite_parses():
    subprocess.run(["bash", "-n", str(PROJECT / "benchmarks" / "gpu_suite.sh")], check=True)


def test_planning_measures_an_epoch():
    report = {
        "batch": 64,
        "max_tokens": 4096,
        "device": "x",
        "cores": 1,
        "load_before": 0.0,
        "date": "",
        "versions": {},
    }
    report["cases"] = [planning.plan_epoch(pairs, 2, 64, 4096) for pairs in (640, 6400)]
    assert all(0 < case["seconds_per_step"] < 1 and 0 <= case["idle"] < 0.2 for case in report["cases"])
    assert report["cases"][0]["idle"] != report["cases"][1]["idle"]
    report["long_rows"] = planning.plan_long_rows("1% 32 times as long", 8, 64, 4096, steps=20)
    cases = {case["sequence_parallel_size"]: case for case in report["long_rows"]}
    longest = cases["1"]["longest_in_budgets"]
    assert 4 < longest < 8 and list(cases) == ["1", "8", "auto"], "a fixed size must hold the longest row"
    assert cases["1"]["fullest_rank"] == round(longest * 4096) > 4096 >= cases["auto"]["fullest_rank"]
    assert [case["tokens_shared"] for case in report["long_rows"][:2]] == [0, 1] and cases["auto"][
        "tokens_shared"
    ] < 0.7
    assert cases["auto"]["idle"] < 0.5 * cases["1"]["idle"]
    table = planning.table(report)
    assert "| 6,400 | 2 |" in table and "| 1% 32 times as long | 8 | auto |" in table


def test_throughput_ratios_are_to_the_fastest_of_trl():
    def arm(work, rate, memory, **more):
        counted = {"pairs_per_second": rate, "all_pairs_per_second": [rate], "tokens_per_second": 100 * rate}
        return {"work": work, "reference": "store", "peak_memory_bytes": memory, "extra": {}, **counted, **more}

    arms = [
        arm("dpo_scale", 3.0, 2e9, layout="packed", compile=True),
        arm("trl", 1.0, 4e9, kind="same", micro_batch_size=2),
        arm("trl", 1.5, 8e9, kind="compiled", micro_batch_size=2),
    ]
    settings = ("model", "dtype", "gradient_checkpointing", "global_batch_size", "steps", "repeats", "ranks")
    report = {name: "?" for name in settings} | {"max_length": 1, "max_tokens": 1, "device": "x", "cores": 1}
    report |= {"load_before": 0.0, "date": "", "versions": {}}
    report["data_sets"] = [{"name": "rows", "pairs": 8, "mean_lengths": [1, 2, 3], "arms": arms}]
    rows = [line.split(" | ") for line in throughput_report.table(report).splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [
        "dpo_scale, packed, compiled, stored reference",
        "TRL, precomputed reference, 2 pairs a micro-batch, compiled",
        "TRL, precomputed reference, 2 pairs a micro-batch",
    ]
    live, precomputed, memory = rows[0][3], rows[0][4], rows[0][6]
    assert (live, precomputed, memory) == ("", "2.00", "0.25")


def test_hooks_are_counted_turn_by_turn():
    arms = {
        zero3_hooks.PLAIN: [1.0, 2.0, 4.0],  # the machine slows down
        zero3_hooks.SUBMODULES: [5.0, 10.0, 20.0],
        zero3_hooks.LAYERS: [2.0, 4.0, 8.0],
    }
    report = {
        "layers": 32, "clock": "thread_time", "seconds": {"a pass": arms}, "versions": {}, "device": "a device",
        "cores": 2, "load_before": 0.0, "date": "today",
    }  # fmt: skip
    rows = [line.split(" | ") for line in zero3_hooks.table(report).splitlines() if line.startswith("| a pass")]
    assert [row[2:4] for row in rows] == [["2000.0 ms", "1.00"], ["10000.0 ms", "5.00"], ["4000.0 ms", "2.00"]]
    assert rows[2][4:] == ["2000.0 ms", "0.25 |"]
