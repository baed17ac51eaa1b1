"""The GPU suite without a GPU: limits, the record, the tables; and once every part with its smallest case."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "benchmarks"))  # where the scripts find each other

import attention as attention_benchmark  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_report  # noqa: E402
import gpu_suite  # noqa: E402
import gpu_wheels  # noqa: E402
import layouts  # noqa: E402
import many_ranks  # noqa: E402
import short_runs  # noqa: E402
from gpu_parts import Part  # noqa: E402

from dpo_scale.models.attention import AttentionPlan  # noqa: E402
from dpo_scale.settings.tree import load_config  # noqa: E402


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def part(name: str, *commands: tuple[str, ...], limit: float = 30.0, **more) -> Part:
    return Part(name, f"what {name} does", limit, commands, **more)


def lines_of(record: Path) -> list[dict]:
    return [json.loads(line) for line in record.read_text().splitlines()]


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_part_that_fails_and_one_that_runs_over_its_limit_are_reported_and_the_others_still_run(tmp_path):
    record, pid_file = tmp_path / "gpu_suite.jsonl", tmp_path / "pid"
    # what a part started is ended with it
    sleeper = (
        f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(pid_file)!r}, 'w').write(str(p.pid))"
    )
    of_first = f"import json; assert json.loads(open({str(record)!r}).readline())['part'] == 'good'"
    measured = f"open({str(tmp_path / 'numbers.json')!r}, 'w').write('[7]')"
    parts = [
        part("good", python(measured), results=("numbers",), figures=lambda found: {"first": found["numbers"][0]}),
        part("bad", python("print('the reason'); raise SystemExit(3)"), python("print('and yet this one runs')")),
        part("endless", python(f"{sleeper}; p.wait()"), python("raise SystemExit(1)"), limit=1.0),
        part("lacking", python("pass"), needs=("json", "no_such_module")),
        part("last", python(of_first)),  # a line is there as soon as its part is done
    ]
    outcomes = gpu_suite.run_parts(parts, tmp_path, record, time.monotonic() + 100)
    assert lines_of(record) == outcomes
    good, bad, endless, lacking, last = outcomes
    assert [outcome["status"] for outcome in outcomes] == ["passed", "failed", "timed out", "left out", "passed"]
    assert good["figures"] == {"first": 7} and "output" not in good
    assert "exit code 3" in bad["reason"] and "the reason" in bad["output"]
    assert "not done within 1 s" in endless["reason"] and 1 <= endless["seconds"] < 15
    assert not is_running(int(pid_file.read_text()))
    assert lacking["reason"] == "no_such_module not installed"
    assert last["seconds"] < 15


@pytest.mark.parametrize(("gpus", "status"), [(0, "left out"), (1, "left out"), (2, "passed")])
def test_a_part_for_several_gpus_is_left_out_where_there_are_fewer(gpus, status, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    parts = [part("several", python("pass"), gpus=2), part("one", python("pass"))]
    several, one = gpu_suite.run_parts(parts, tmp_path, tmp_path / "record", time.monotonic() + 100)
    assert (several["status"], one["status"]) == (status, "passed")
    assert several.get("reason") == (f"needs 2 GPUs, {gpus} here" if gpus < 2 else None)
    (of_suite,) = (p for p in gpu_parts.all_parts("cuda", False, tmp_path) if p.gpus)
    assert of_suite.name == "ranks" and not any(p.gpus for p in gpu_parts.all_parts("cpu", True, tmp_path))


def test_what_does_not_begin_in_time_is_left_out_and_the_last_part_gets_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "LEAST_SECONDS", 1.5)
    parts = [part("long", python("import time; time.sleep(60)")), part("late", python("pass"))]
    outcomes = gpu_suite.run_parts(parts, tmp_path, tmp_path / "record", time.monotonic() + 2.5)
    assert [outcome["status"] for outcome in outcomes] == ["timed out", "left out"]
    assert outcomes[1]["reason"] == "no time left"


def test_figures_are_never_those_of_an_earlier_run(tmp_path):
    (tmp_path / "numbers.json").write_text("[7]")
    os.utime(tmp_path / "numbers.json", (1, 1))
    stale = part("stale", python("pass"), results=("numbers",), figures=lambda found: {"first": found["numbers"][0]})
    (outcome,) = gpu_suite.run_parts([stale], tmp_path, tmp_path / "record", time.monotonic() + 100)
    assert "figures" not in outcome


def test_a_suite_that_is_told_to_end_takes_its_part_along_and_leaves_what_was_done(tmp_path):
    code = f"""
import sys, time
sys.path[:0] = [{str(PROJECT / "benchmarks")!r}]
import gpu_suite
from pathlib import Path
from gpu_parts import Part
sleep = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"
parts = [Part("one", "", 30, ((sys.executable, "-c", "pass"),)), Part("two", "", 30, ((sys.executable, "-c", sleep),))]
gpu_suite.end_on_signals()
gpu_suite.run_parts(parts, Path({str(tmp_path)!r}), Path({str(tmp_path / "record")!r}), time.monotonic() + 60)
"""
    suite = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    pid = next(int(line.split()[1]) for line in suite.stdout if line.startswith("pid"))
    suite.send_signal(signal.SIGTERM)
    suite.communicate(timeout=20)
    assert suite.returncode == 128 + signal.SIGTERM
    assert not is_running(pid)
    assert [line["part"] for line in lines_of(tmp_path / "record")] == ["one"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "kernel"], "--only: no part is called 'kernel'; the parts are first, kernels"),
        ([], "torch finds no GPU here; --dry-run"),
        (["--minutes", "0"], "--minutes 0: expected more than 0"),
        (["--dry-run", "--output", "/proc/nowhere"], "--output /proc/nowhere: cannot be made"),
        (["--dry-run", "--output", str(PROJECT / "benchmarks" / "results" / "x")], "a dry run measures nothing"),
        (["--readme", "/nowhere/gpus.md"], "--readme: [Errno 2] No such file or directory: '/nowhere/gpus.md'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, capsys, monkeypatch):
    monkeypatch.delenv("WHEELS", raising=False)
    monkeypatch.setattr(gpu_suite, "end_on_signals", lambda: None)
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main(arguments)
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.startswith("error: ") and said in printed and printed.count("\n") == 1


def test_an_unknown_part_is_refused_before_a_folder_is_made(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(["--dry-run", "--only", "first", "nonsense", "--output", str(tmp_path / "results")])
    assert "no part is called 'nonsense'" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_every_part_has_a_dry_form_and_together_they_fit_into_the_time(tmp_path):
    dry = gpu_parts.all_parts("cpu", True, tmp_path)
    full = gpu_parts.all_parts("cuda", False, tmp_path)
    assert [p.name for p in dry] == [p.name for p in full]
    assert len({p.name for p in dry}) == len(dry) == 14
    for p in (*dry, *full):
        for command in p.commands:
            assert str(tmp_path) in command or "pytest" in command  # never among the stored results by mistake


@pytest.mark.parametrize("group", [*short_runs.GROUPS.values(), *many_ranks.GROUPS.values()])
def test_the_runs_for_a_gpu_are_valid_configs(group, tmp_path, monkeypatch):
    """Which no CPU will train: at least no setting is misspelt or contradicts another."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for case in group(False, False):
        load_config(None, short_runs.settings_of(case, "cuda", tmp_path, tmp_path, tmp_path, tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run them")
def test_the_commands_for_a_gpu_are_understood_by_their_scripts(tmp_path, monkeypatch, capsys):
    """Each reads its arguments and then says that there is no GPU, and nothing else."""
    commands = [command for p in gpu_parts.all_parts("cuda", False, tmp_path) for command in p.commands]
    say_so_first = {"short_runs", "many_ranks", "layouts", "attention", "logprobs", "throughput"}
    seen = set()
    for _, script, *arguments in commands:
        if Path(script).stem not in say_so_first:
            continue
        module = importlib.import_module(Path(script).stem)
        seen.add(module.__name__)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert "--device cuda: " in f"{ended.value}{capsys.readouterr().err}"
    assert seen == say_so_first
    assert not list(tmp_path.iterdir())


def test_a_folder_of_wheels_is_weighed_by_what_is_needed(tmp_path, capsys):
    (tmp_path / "Py_CPUInfo-9.0-py3-none-any.whl").write_bytes(b"x" * 1000)
    (tmp_path / "unneeded-1-py3-none-any.whl").write_bytes(b"x" * 10**6)
    assert gpu_wheels.list_wheels(tmp_path) == 0
    assert "0.0 MiB of these, of at most 64" in capsys.readouterr().out
    with (tmp_path / "pyarrow-21.0.0-cp312-cp312-any.whl").open("wb") as file:
        file.truncate(65 * 2**20)
    assert gpu_wheels.list_wheels(tmp_path) == 2
    assert "too heavy" in capsys.readouterr().err
    assert gpu_wheels.file_of("pyarrow<22", tmp_path).name.startswith("pyarrow-21")
    assert gpu_wheels.file_of("typing-inspection", tmp_path) is None


def head_row(arm: str, seconds: float, tokens: int = 8192) -> dict:
    row = {"head": "Llama-3-8B", "tokens": tokens, "mode": "forward_backward", "arm": arm, "time": seconds}
    return row | {"seconds": [seconds], "floor_share": 0.03 / seconds, "extra_bytes": 500_000_000}


def throughput_report(rates: dict[str, float], trl: float | None = None) -> dict:
    arms = [
        {
            "work": "dpo_scale",
            "layout": layout,
            "compile": False,
            "pairs_per_second": rate,
            "extra": {"mfu": rate / 100},
        }
        for layout, rate in rates.items()
    ]
    arms += [{"work": "trl", "pairs_per_second": trl}] if trl else []
    return {"data_sets": [{"name": "prompt / completion = 1", "arms": arms}]}


def test_targets_are_read_from_results_and_what_has_none_is_not_measured(tmp_path):
    page = tmp_path / "gpus.md"
    begin, end = gpu_report.MARKERS
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    results = tmp_path / "results"
    gpu_report.update_page(page, results)
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n") and text.endswith(f"{end}\nafter\n") and "old" not in text
    assert text.count(gpu_report.NOT_MEASURED) == 1 + len(gpu_report.TARGETS)

    rows = [head_row("triton", 0.036), head_row("pair_loss", 0.04), head_row("trl", 0.09), head_row("naive", 0.07)]
    runs = {
        name: {"step_seconds": seconds, "first_margin": margin}
        for name, seconds, margin in (
            ("ZeRO 2, stored, host", 0.25, 0.0), ("ZeRO 2, stored, 16 k", 1.5, -2e-3),
            ("ZeRO 3, stored, host", 0.5, 1e-3), ("ZeRO 3, stored, 16 k", 2.0, 0.0),
        )
    }  # fmt: skip
    reports = {
        "throughput_llama-3.2-1b": throughput_report({"shared_prefix": 46.0}, 20.0),
        "throughput_qwen2.5-3b": throughput_report({"shared_prefix": 41.0}, 20.0),
    }
    figures = {
        "heads": gpu_parts.of_heads({"rows": [*rows, head_row("triton", 0.001, tokens=512)]}),
        "shape": runs,
        "throughput": {name: gpu_parts.of_throughput(report) for name, report in reports.items()},
        "ratios": gpu_parts.of_throughput(throughput_report({"packed": 10.0, "shared_prefix": 13.5})),
        "ranks": {
            "split": {"rows whole": {"step_seconds": 2.0}, "over 2 ranks": {"times_step": 1.1, "times_memory": 0.62}},
            "overlap": {"overlap_comm": {"hidden": 0.83}, "no overlap_comm": {"hidden": 0.04}},
            "deaths": {"killed": {"exit_codes": [71, -9], "seconds_to_end": 3.2}},
        },
    }
    folder = results / "a-gpu"
    folder.mkdir(parents=True)
    run = {"device": "A GPU", "cores": 16, "load_before": 0.0, "date": "2026-01-02", "versions": {"torch": "2.11"}}
    lines = [{"run": "measured", **run}]
    lines += [{"part": n, "status": "passed", "seconds": 60, "figures": found} for n, found in figures.items()]
    lines += [{"part": "kernels", "status": "timed out", "seconds": 270, "reason": "not done within 270 s"}]
    lines += [{"part": "heads", "status": "left out", "seconds": 0, "reason": "no time left"}]  # measured all the same
    (folder / "gpu_suite.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "attention.md").write_text("# Attention\n")
    gpu_report.update_page(page, results)
    text = page.read_text()
    for said in (
        "### A GPU", "| 83% |", "| 0.50 GB |", "36.0 ms; the fastest other is naive, 70.0 ms", "| 2.30, 2.05 |",
        "| 46.0%, 41.0% |", "| 1.35 |", "| 2.0e-03 at most |", "ZeRO 2: 0.25 s of 1.50 s; ZeRO 3: 0.50 s of 2.00 s",
        "over 2 ranks: 1.10 of the time, 0.62 of the memory |", "overlap_comm: 83%, no overlap_comm: 4% |",
        "| exit codes 71, -9 within 3 s |", "| kernels | timed out | 270 s | not done within 270 s |",
        "| heads | passed | 60 s |", "attention.md",
    ):  # fmt: skip
        assert said in text
    assert gpu_report.NOT_MEASURED not in text

    page.write_text("no markers")
    with pytest.raises(ValueError, match="gpu-suite: begin"):
        gpu_report.update_page(page, results)


@pytest.mark.parametrize("tokens", [3, 34, 127, 128, 129, 700])
def test_a_row_of_the_attention_benchmark_has_exactly_its_tokens_and_its_flops_are_those_of_the_mask(tokens):
    batch = attention_benchmark.row_of(tokens, 100)
    assert batch.input_ids.shape == (1, tokens)
    d, b, p = batch.document_ids[0], batch.branch_ids[0], batch.position_ids[0]
    allowed = (d[:, None] == d) & ((b == 0) | (b == b[:, None])) & (p <= p[:, None])
    assert attention_benchmark.pairs_that_attend(batch) == allowed.sum()
    pairs = [len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in layouts.pairs_in(tokens)]
    assert sum(pairs) == tokens


def test_a_back_end_that_lets_branches_see_each_other_disagrees(tmp_path, monkeypatch):
    arguments = ["--device", "cpu", "--backends", "blocks", "--lengths", "129", "--output", str(tmp_path)]
    assert layouts.main(arguments) == 0
    right = AttentionPlan.__init__

    def wrong(plan, position_ids, document_ids, branch_ids, segments, group=None):
        right(plan, position_ids, document_ids, branch_ids, ((sum(tokens for tokens, _ in segments), 0),), group)

    monkeypatch.setattr(AttentionPlan, "__init__", wrong)
    assert layouts.main(arguments) == 1
    assert gpu_parts.of_layouts(json.loads((tmp_path / "layouts.json").read_text()))["blocks"]["agree"] == 0
    assert "DISAGREES" in (tmp_path / "layouts.md").read_text()


def test_waits_are_counted_by_the_line_that_made_them(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    found = {}
    with short_runs.waits_counted(found):
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    ((place, count),) = found["waits"].items()
    assert place.startswith("tests/unit/test_gpu_suite.py:") and count == 3


def test_a_trace_is_summed_up_by_kernel_and_overlaps_count_once():
    def span(name, start, micros, cat="kernel"):
        return {"ph": "X", "name": name, "ts": start, "dur": micros, "cat": cat}

    events = [span("a", 0, 3000), span("b", 1000, 3000), span("a", 8000, 2000), span("host", 0, 9999, "cpu_op")]
    found = short_runs.profile_summary({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]})
    assert found["milliseconds"] == [("a", 5.0), ("b", 3.0)]
    assert found["busy"] == pytest.approx(0.6) and found["of"] == "device" and "hidden" not in found


def test_communication_is_hidden_while_anything_else_runs_on_the_device():
    def kernel(name, start, micros):
        return {"ph": "X", "name": name, "ts": start, "dur": micros, "cat": "kernel"}

    # 8 of NCCL's time; something computes in 2 to 5 and 6 to 9, two kernels at once in part of that
    gathers = [kernel("ncclDevKernel_AllGather", 0, 4), kernel("ncclDevKernel_ReduceScatter", 4, 4)]
    computes = [kernel("gemm", 2, 2), kernel("gemm", 3, 2), kernel("norm", 6, 3)]
    found = short_runs.profile_summary({"traceEvents": [*computes, *gathers]})
    assert found["hidden"] == pytest.approx(5 / 8) and found["busy"] == pytest.approx(1.0)
    run = {"run": "a", "profile": found}
    assert gpu_parts.of_ranks({"many_ranks_overlap": {"runs": [run]}}) == {"overlap": {"a": {"hidden": 5 / 8}}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"losses": [0.7, 0.65]}, "over 2 ranks: losses are up to 0.05 and log-probs 0 of their size"),
        ({"logps": [-100.0, -121.0]}, "losses are up to 0 and log-probs 0.00833 of their size"),
        ({"losses": [0.7, float("nan")]}, "losses are up to nan"),
        ({"allocated_bytes": 100}, "over 2 ranks: most allocated is 1.00 times that of whole rows, not less"),
    ],
)
def test_split_rows_that_change_the_numbers_or_save_no_memory_fail(change, said):
    whole = {"losses": [0.7, 0.6], "logps": [-100.0, -120.0], "step_seconds": 2.0, "allocated_bytes": 100}
    over_2 = {**whole, "step_seconds": 1.5, "allocated_bytes": 60, **change}
    report = {"runs": [{"run": many_ranks.WHOLE, **whole}, {"run": "over 2 ranks", **over_2}]}
    many_ranks.compare(report, "cuda")
    assert report["runs"][1]["times_step"] == 0.75
    assert "over 2 ranks | 0.75 |" in "\n".join(report["beside"])
    assert (report.get("failed") is None) if said is None else (said in report["failed"])


def test_a_death_is_passed_only_if_the_other_ranks_end_by_themselves_with_their_exit_code(tmp_path, monkeypatch):
    """The ranks here are small programs in the place of training."""
    dies = "import os, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(0.2)\n"
    monkeypatch.setattr(short_runs, "measured", lambda *_: {})
    monkeypatch.setattr(short_runs, "random_model", lambda *_, **__: None)
    monkeypatch.setattr(short_runs, "SECONDS_TO_FOLLOW", 2.0)
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(short_runs, "__file__", str(worker))
    case = short_runs.Case("killed", ranks=2, killed_in_step=1, killed_rank=1)
    outcomes = []
    for survivor in ("os._exit(71)", "os._exit(70)", "os._exit(1)", "time.sleep(60)"):
        worker.write_text(dies + survivor)
        outcomes.append(short_runs.run_case(case, tmp_path, "cpu"))
    lost, hung, failed, waiting = outcomes
    assert lost["exit_codes"] == [71, -9] and 0.1 < lost["seconds_to_end"] < 2
    assert hung["exit_codes"] == [70, -9]
    assert "rank 0, exit code 1" in failed["failed"]
    assert "rank 0, exit code -9" in waiting["failed"]  # it was waited for, and then killed


def test_a_resumed_run_with_other_losses_fails():
    report = {"runs": [{"run": "uninterrupted", "losses": [0.7, 0.6]}, {"run": "resumed", "losses": [0.7, 0.601]}]}
    short_runs.finish(report, "cuda")
    assert "failed" not in report
    short_runs.finish(report, "cpu")
    assert "up to 0.001 from" in report["failed"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_dry_run_goes_through_every_part_and_says_what_became_of_each(tmp_path):
    results = PROJECT / "benchmarks" / "results"
    before = {file: file.stat().st_mtime_ns for file in results.rglob("*")}
    environment = {name: value for name, value in os.environ.items() if name not in ("WHEELS", "TRITON_INTERPRET")}
    done = subprocess.run(
        ["bash", "benchmarks/gpu_suite.sh", "--dry-run", "--output", str(tmp_path)],
        cwd=PROJECT, env={**environment, "PYTHON": sys.executable}, capture_output=True, text=True,
    )  # fmt: skip
    run, *parts = lines_of(tmp_path / "gpu_suite.jsonl")
    assert done.returncode == 0, [part for part in parts if part["status"] not in ("passed", "left out")]
    assert run["run"] == "dry run"
    assert [part["part"] for part in parts] == [p.name for p in gpu_parts.all_parts("cpu", True, tmp_path)]
    for found in parts:
        # what is not installed (liger-kernel, say) is no reason here: all that the parts need comes with the tests
        assert found["status"] == "passed", found
        assert found["part"] == "kernels" or found["figures"], found
    assert {file: file.stat().st_mtime_ns for file in results.rglob("*")} == before
