"""Computing reference log-probs beside TRL's `precompute_ref_log_probs`. `python benchmarks/precompute.py`.

Same weights, precision, token ids and threads for both, taking turns in one run, each measurement in processes of its
own. The seconds are those between a loaded model with tokenized rows and stored values: for dpo_scale finding what
the store lacks, laying out, forward passes, writing shards and manifest; for TRL the whole of
`DPOTrainer._precompute_ref_logps`, which ends with a cache file. TRL is given several batch sizes, and both are run
as one process with all threads and, on a CPU, as one process a core; the fastest counts. Nothing is warmed up.

Tokens are those of the data: a pair's prompt once, its two completions once, no padding. Model FLOPs are what these
need, however many a layout computes:

    2 * (parameters without embedding and head) * tokens
    + 4 * layers * (heads * head size) * (sum over tokens of the tokens that each attends to)
    + 2 * hidden size * vocabulary * (scored tokens)

and utilisation is that over seconds and over the fastest of some large matrix products with all threads, in the same
precision, in the same run. Results go to `benchmarks/results/<device>/precompute.{md,json}`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import accelerator, circumstances, cores, describe_circumstances, matmul_flops_per_second, write_results

from dpo_scale.data.dataset import PairDataset, load_pairs
from dpo_scale.distributed import ranks
from dpo_scale.distributed.join import join
from dpo_scale.models.builtin import resolve_model_path
from dpo_scale.models.load import load_causal_lm, load_reference, load_tokenizers
from dpo_scale.reference.compute import fill
from dpo_scale.reference.modes import open_book
from dpo_scale.settings.tree import Config, load_config

QUICK_PAIRS = 24
DEMO_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "dpo_en_demo.json"
MATMUL_SECONDS = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--data", default=str(DEMO_DATA) if DEMO_DATA.exists() else "builtin:plain_sentence_train")
    parser.add_argument("--pairs", type=int, help="only the first so many pairs")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[16384], help="of a forward pass of dpo_scale")
    parser.add_argument("--trl-batch-sizes", type=int, nargs="+", default=[1, 4, 8], help="pairs a batch of TRL")
    parser.add_argument("--ranks", type=int, nargs="+", help="processes (default: 1 and one a core or accelerator)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PAIRS} pairs, 1 repeat")
    parser.add_argument(
        "--output", type=Path, help="folder of the results (default: results/<device> beside this file)"
    )
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # one measurement, in a process of its own
    arguments = parser.parse_args()
    if arguments.job is not None:
        job = json.loads(arguments.job.read_text(encoding="utf-8"))
        result = {"ours": run_ours, "trl": run_trl, "matmul": run_matmul}[job["who"]](job)
        if ranks.is_main():
            Path(job["output"]).write_text(json.dumps(result), encoding="utf-8")
        return
    if arguments.quick:
        arguments.pairs, arguments.repeats = arguments.pairs or QUICK_PAIRS, 1
    with tempfile.TemporaryDirectory() as folder:
        report = measure(arguments, Path(folder))
    write_results("precompute", report, table(report), arguments.output)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    common = {name: getattr(arguments, name) for name in ("model", "data", "pairs", "max_length", "dtype")}
    common["folder"] = str(folder)
    ranks.quiet_libraries()
    dataset = pairs_of(common)
    save_for_trl(dataset, folder / "rows")
    numbers_of_ranks = arguments.ranks or sorted({1, torch.cuda.device_count() or cores()})
    jobs = [
        {**common, "who": "ours", "max_tokens": most, "ranks": n}
        for n in numbers_of_ranks
        for most in arguments.max_tokens
    ]
    trl = importlib.util.find_spec("trl") is not None
    if trl:
        theirs = [
            {**common, "who": "trl", "batch_size": size, "ranks": n}
            for n in numbers_of_ranks
            for size in arguments.trl_batch_sizes
        ]
        between = -(-len(theirs) // len(jobs))
        # ours and theirs take turns, so that a slow spell of the machine meets both
        jobs = [one for i, job in enumerate(jobs) for one in (job, *theirs[i * between : (i + 1) * between])]
    machine = circumstances(accelerator(), "torch", "transformers", "deepspeed", "trl")
    runs: list[list[dict[str, Any]]] = [[] for _ in jobs]
    peaks = []
    for _ in range(arguments.repeats):
        peaks.append(in_processes({**common, "who": "matmul", "ranks": 1})["flops_per_second"])
        for job, results in zip(jobs, runs, strict=True):
            results.append(in_processes(job))
            print(f"{describe(job)}: {results[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    lengths = dataset.lengths.astype(np.int64)
    tokens = int(lengths.sum())
    shape = next(results[0]["shape"] for job, results in zip(jobs, runs, strict=True) if job["who"] == "ours")
    flops, peak = model_flops(lengths, shape), max(peaks)
    measured = []
    for job, results in zip(jobs, runs, strict=True):
        seconds = statistics.median(result["seconds"] for result in results)
        measured.append(
            {
                "who": job["who"],
                "settings": {name: job[name] for name in ("max_tokens", "batch_size", "ranks") if name in job},
                "seconds": [result["seconds"] for result in results],
                "process_seconds": [result["process_seconds"] for result in results],
                "tokens_per_second": tokens / seconds,
                "flop_utilisation": flops / seconds / peak,
            }
            | ({"second_time_seconds": [r["second_seconds"] for r in results]} if job["who"] == "ours" else {})
        )
    best = {
        who: max((m["tokens_per_second"] for m in measured if m["who"] == who), default=None) for who in ("ours", "trl")
    }
    sums = {job["who"]: np.array(results[0]["sums"]) for job, results in zip(jobs, runs, strict=True)}
    apart = np.abs(sums["ours"] - sums["trl"]) / lengths[:, 1:] if trl else None
    return {
        "pairs": len(dataset),
        "data_tokens": tokens,
        "data": Path(arguments.data).name,
        "model": Path(arguments.model).name,
        "dtype": arguments.dtype,
        "max_length": arguments.max_length,
        "repeats": arguments.repeats,
        "measured": measured,
        "best_ratio": best["ours"] / best["trl"] if trl else None,
        "mean_difference_per_token": float(apart.mean()) if apart is not None else None,
        "model_flops": flops,
        "matmul_flops_per_second": peak,
        "shape": shape,
        **machine,
    }


def in_processes(job: dict[str, Any]) -> dict[str, Any]:
    """Run one measurement in `ranks` processes that share the threads; what it returns, and how long all of it took."""
    with tempfile.TemporaryDirectory(dir=job["folder"]) as place:
        job = {**job, "place": place, "output": f"{place}/result.json"}
        file = Path(place) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(job["ranks"])]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(max(1, cores() // job["ranks"])),
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *(start if job["ranks"] > 1 else []), __file__, "--job", str(file)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        if done.returncode != 0:
            raise SystemExit(f"{describe(job)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return {**json.loads(Path(job["output"]).read_text(encoding="utf-8")), "process_seconds": seconds}


def config_of(job: dict[str, Any]) -> Config:
    return load_config(
        None,
        [
            f"model.path={job['model']}", f"model.dtype={job['dtype']}", f"data.train={job['data']}",
            f"data.max_length={job['max_length']}", f"data.cache_dir={job['folder']}/tokenized",
            *([f"reference.store={job['place']}/store"] if "place" in job else []),
        ],
    )  # fmt: skip


def pairs_of(job: dict[str, Any]) -> PairDataset:
    config = config_of(job)
    data = load_pairs(config.data, load_tokenizers(config)[0], seed=config.train.seed, log=lambda line: None).train
    return data.select(np.arange(min(len(data), job["pairs"] or len(data))))


def run_ours(job: dict[str, Any]) -> dict[str, Any]:
    """Fill an empty store, then once more."""
    config = config_of(job)
    join(config.deepspeed.timeout_minutes, config.deepspeed.start_timeout_minutes)
    ranks.quiet_libraries()
    dataset, pad_token_id = pairs_of(job), load_tokenizers(config)[0].pad_token_id
    book, reference = open_book(config), load_reference(config)

    def timed(book: Any, load: Callable[[], Any]) -> tuple[float, int]:
        ranks.barrier()
        began = time.perf_counter()
        computed = fill(book, [dataset], load, pad_token_id=pad_token_id, max_tokens=job["max_tokens"], tokens=False)
        return time.perf_counter() - began, computed

    def no_model() -> Any:
        raise AssertionError("nothing is missing, so no model must be asked for")

    seconds, computed = timed(book, lambda: reference)
    assert computed == len(np.unique(dataset.pair_keys, axis=0))
    book = open_book(config)
    second_seconds, computed = timed(book, no_model)
    assert computed == 0
    model = reference.module.model
    text = model.config.get_text_config()
    tables = {id(table.weight): table.weight for table in (model.get_input_embeddings(), model.get_output_embeddings())}
    heads = text.num_attention_heads
    shape = {
        "parameters": sum(p.numel() for p in model.parameters()) - sum(table.numel() for table in tables.values()),
        "layers": text.num_hidden_layers,
        "attention_width": heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        "hidden_size": text.hidden_size,
        "vocabulary": model.get_output_embeddings().weight.shape[0],
    }
    sums = book.lookup(dataset.pair_keys).sums
    return {"seconds": seconds, "second_seconds": second_seconds, "shape": shape, "sums": sums.tolist()}


def save_for_trl(dataset: PairDataset, folder: Path) -> None:
    """Our token ids as TRL's columns. On the disk, since TRL puts its values beside them, for all ranks to read."""
    from datasets import Dataset

    pairs = [dataset[i] for i in range(len(dataset))]
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    Dataset.from_dict({name: [getattr(p, name).tolist() for p in pairs] for name in columns}).save_to_disk(folder)


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    """Let a `DPOTrainer` compute its reference columns."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    seconds = []

    class Timed(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # tokenized already

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            self.accelerator.wait_for_everyone()
            began = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            seconds.append(time.perf_counter() - began)
            return dataset

    on_cpu = not torch.cuda.is_available()
    settings = DPOConfig(
        output_dir=f"{job['place']}/trl",
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=job["batch_size"],
        max_length=job["max_length"],
        bf16=False,  # the weights are in the precision asked for, as ours are; autocast on top of it only costs
        fp16=False,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and ranks.world_size() > 1 else None,
        report_to="none",
    )
    # every rank of a launch gets the same copy, in which nothing is cached
    rows = Path(job["place"]) / "rows"
    if ranks.is_main():
        shutil.copytree(Path(job["folder"]) / "rows", Path(job["place"]) / "copying")
        (Path(job["place"]) / "copying").rename(rows)
    while not rows.exists():
        time.sleep(0.05)
    trainer = Timed(
        load_causal_lm(job["model"], dtype=job["dtype"]),
        args=settings,
        train_dataset=load_from_disk(str(rows)),
        processing_class=AutoTokenizer.from_pretrained(resolve_model_path(job["model"])),
    )
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    sums = list(zip(*(trainer.train_dataset[:][name] for name in columns), strict=True))
    assert len(seconds) == 1
    return {"seconds": seconds[0], "sums": sums}


def run_matmul(job: dict[str, Any]) -> dict[str, Any]:
    """The most FLOPs a second that a large product of matrices reaches here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"flops_per_second": matmul_flops_per_second(device, getattr(torch, job["dtype"]), MATMUL_SECONDS)}


def model_flops(lengths: np.ndarray, shape: dict[str, int]) -> int:
    """What a forward pass over pairs needs, prompts once; see above.

    Args:
        lengths: int64 [N, 3], tokens of prompt, chosen and rejected.
    """
    prompt, completions = lengths[:, :1], lengths[:, 1:]
    attended = (prompt * (prompt + 1) // 2).sum() + (completions * prompt + completions * (completions + 1) // 2).sum()
    return int(
        2 * shape["parameters"] * lengths.sum()
        + 4 * shape["layers"] * shape["attention_width"] * attended
        + 2 * shape["hidden_size"] * shape["vocabulary"] * completions.sum()
    )


def describe(job: dict[str, Any]) -> str:
    """One measurement, for progress and table; `job` may be its settings alone."""
    ranks = job.get("ranks", 1)
    processes = f"{ranks} process{'es' if ranks > 1 else ''}"
    if "max_tokens" in job:
        return f"dpo_scale, up to {job['max_tokens']:,} token slots a pass, {processes}"
    if "batch_size" in job:
        return f"TRL, precompute_ref_batch_size {job['batch_size']}, {processes}"
    return f"matrix products, {processes}"


def table(report: dict[str, Any]) -> str:
    lines = [
        "# Computing reference log-probs",
        "",
        f"{report['pairs']} pairs of {report['data']} ({report['data_tokens']:,} tokens, prompts once; "
        f"max_length {report['max_length']}), {report['model']} in {report['dtype']}, median of {report['repeats']}. "
        f"{describe_circumstances(report)} Made by `python benchmarks/precompute.py`, which says what is counted.",
        "",
        "| what | seconds (fastest to slowest) | tokens/s | FLOP utilisation | whole process, s |",
        "|---|---|---|---|---|",
    ]
    for m in report["measured"]:
        seconds = statistics.median(m["seconds"])
        lines.append(
            f"| {describe(m['settings'])} | {seconds:.2f} ({min(m['seconds']):.2f} to {max(m['seconds']):.2f}) "
            f"| {m['tokens_per_second']:,.0f} | {m['flop_utilisation']:.1%} "
            f"| {statistics.median(m['process_seconds']):.1f} |"
        )
        if "second_time_seconds" in m:
            again = statistics.median(m["second_time_seconds"])
            lines.append(f"| ... the same rows again, no forward pass | {again:.4f} | | | |")
    if report["best_ratio"] is None:
        lines.append("| TRL | absent | | | |")
    lines.append("")
    if report["best_ratio"] is not None:
        lines.append(
            f"The fastest of dpo_scale is {report['best_ratio']:.2f} times the fastest of TRL. Their values are "
            f"{report['mean_difference_per_token']:.2g} nats a token apart on average."
        )
    lines.append(
        f"Utilisation is of {report['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s, the fastest matrix product; the "
        f"data need {report['model_flops'] / 1e12:.2f} TFLOP."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
