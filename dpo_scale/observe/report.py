"""What a run learnt, on one screen: held-out metrics and answers, before and after.

Metrics say that preferences moved. Only answers say whether that is what was meant. Both models answer the same
held-out prompts greedily, from the token ids that training saw, so the training is all that differs.
"""

from __future__ import annotations

import os
import shlex
import textwrap
from pathlib import Path
from typing import Any

from dpo_scale.errors import UserError
from dpo_scale.settings.resume import CONFIG_FILE
from dpo_scale.settings.tree import Config, load_config

WIDTH = 90
# How far into the held-out data the answered prompts are; the same ones in every report.
PROMPT_SHARES = (0.1, 0.4, 0.7)
MAX_NEW_TOKENS = 72

# metric, what a reader calls it, how it is shown
TABLE_ROWS = (
    ("rewards/accuracies", "reward accuracy", "{:.1%}"),
    ("rewards/margins", "reward margin", "{:.3f}"),
    ("accuracy/policy", "policy accuracy", "{:.1%}"),
    ("loss", "loss", "{:.4f}"),
)
EXPLANATION = (
    "Reward accuracy: pairs for which training raised the chosen answer against the rejected one. Reward "
    "margin: by how much, times beta. At the start the model is its own reference, so every margin is 0, or "
    "rounding where the reference was computed in other batches, and the accuracy says nothing yet. Policy "
    "accuracy: pairs whose chosen answer, as a whole, the model finds likelier than the rejected one."
)


def print_report(run_dir: Path) -> None:
    """Print the report of a finished run that was evaluated before and after.

    Raises:
        UserError: if the folder is not that of such a run.
    """
    from transformers.utils import logging

    from dpo_scale.data.tokenize import load_tokenizer
    from dpo_scale.models.export import MODEL_DIR
    from dpo_scale.observe.metrics_file import METRICS_FILE, read_metrics

    logging.disable_progress_bar()
    for needed in (CONFIG_FILE, METRICS_FILE, MODEL_DIR):
        if not (run_dir / needed).exists():
            raise UserError(f"{run_dir}: no {needed} there; expected the folder of a finished run")
    config = load_config(run_dir / CONFIG_FILE)
    records = read_metrics(run_dir / METRICS_FILE)
    evaluations = [record for record in records if record["phase"] == "eval"]
    if not config.data.eval or len(evaluations) < 2:
        raise UserError(
            f"{run_dir}: no two evaluations to compare; expected a run with data.eval and train.eval_on_start"
        )
    print("\n".join(metrics_table(evaluations[0], evaluations[-1])), flush=True)
    forecasts = [record for record in records if record["phase"] == "forecast"]
    if forecasts:
        print("\n".join(forecast_lines(forecasts[-1])), flush=True)

    trained = str(run_dir / MODEL_DIR)
    tokenizer = load_tokenizer(trained, chat_template=config.data.chat_template)
    prompts = held_out_prompts(config, tokenizer)
    ids = [prompt_ids for _, prompt_ids in prompts]
    answers = [greedy_answers(config, path, tokenizer, ids) for path in (config.model.path, trained)]
    for (prompt, _), before, after in zip(prompts, *answers, strict=True):
        print()
        for label, text in (("prompt", prompt), ("before", before), ("after", after)):
            print(_hanging(label, text))
    print("\n".join(["", *what_next(run_dir, config)]))


def metrics_table(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The lines of a table of two evaluations; a metric that either lacks is left out."""
    head = f"{int(after['pairs'])} held-out pairs"
    lines = [f"{head:<30}{'before':>12}{'after':>12}", "-" * 54]
    for name, title, shown in TABLE_ROWS:
        if before.get(name) is not None and after.get(name) is not None:
            lines.append(f"{title:<30}{shown.format(before[name]):>12}{shown.format(after[name]):>12}")
    return [*lines, "", *textwrap.wrap(EXPLANATION, WIDTH)]


def forecast_lines(record: dict[str, Any]) -> list[str]:
    """What was predicted before the run, beside what was measured."""
    rows = (("peak_memory_bytes", "memory, GB", 1e9), ("step_seconds", "a step, seconds", 1.0))
    lines = ["", f"{'of the run':<30}{'predicted':>12}{'measured':>12}", "-" * 54]
    for name, title, unit in rows:
        if name in record:
            lines.append(f"{title:<30}{record[f'{name}/predicted'] / unit:>12.3f}{record[name] / unit:>12.3f}")
    return lines


def held_out_prompts(config: Config, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """Prompts of the first held-out source: what the user said last, and the ids that training saw."""
    from dpo_scale.data.schemas import columns_of, detect_schema, to_preference
    from dpo_scale.data.sources import find_files, parse_record
    from dpo_scale.data.tokenize import PairTokenizer, TokenizedPair

    encoder = PairTokenizer(tokenizer, config.data)
    source = config.data.for_source(config.data.eval[0])
    rows = [parse_record(content) for file in find_files(source) for _, content in file.records()]
    schema = source.schema if source.schema != "auto" else detect_schema(rows, source)
    assert schema is not None, "the run has read these rows"
    chosen = [rows[int(share * len(rows))] for share in PROMPT_SHARES]
    preferences = [to_preference(row, columns_of(source, schema), chat=encoder.chat) for row in chosen]
    texts = [p.prompt if isinstance(p.prompt, str) else p.prompt[-1]["content"] for p in preferences]
    pairs = zip(texts, encoder.tokenize(preferences), strict=True)
    return [(text, pair.prompt_ids) for text, pair in pairs if isinstance(pair, TokenizedPair)]


def greedy_answers(config: Config, path: str, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
    """A model's greedy answers, in one batch; one cut at `MAX_NEW_TOKENS` ends in "...".

    Args:
        path: a model folder, hub id or `builtin:` name; the run's start has the config's revision.
        prompts: the ids of each prompt.
    """
    import torch

    from dpo_scale.models.load import load_causal_lm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_causal_lm(
        path,
        dtype="bfloat16",  # also on CPU: reading the weights is what takes the time there
        revision=config.model.revision if path == config.model.path else None,
        trust_remote_code=config.model.trust_remote_code,
    )
    model.to(device).eval()
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    with torch.inference_mode():
        output = model.generate(
            **batch,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
        )
    answers = []
    for tokens in output[:, batch["input_ids"].shape[1] :].tolist():
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        answers.append(text if ends.intersection(tokens) else f"{text} ...")
    return answers


def what_next(run_dir: Path, config: Config) -> list[str]:
    """The lines that say what the run left where, and the commands that a reader would want next."""
    model, start = shlex.quote(str(run_dir / "model")), shlex.quote(config.model.path)
    train = "deepspeed --num_accelerators 2 launch/train.py --config configs/quickstart.yaml"
    lines = [
        f"Saved in {run_dir}:",
        "  model/          the trained model, in Hugging Face format, with its card",
        "  metrics.jsonl   every step's metrics, and the evaluations",
        "  config.yaml     every setting, resolved; it reproduces the run",
        "  checkpoints/    what --resume continues from",
        "",
        "What next (from the project's folder):",
        f"  source {shlex.quote(os.path.relpath(os.environ.get('VIRTUAL_ENV', '.venv')))}/bin/activate",
        "  # the same metrics, of any model on any preference file",
        f"  python launch/evaluate.py --model {model} --reference {start} \\",
        f"      --data {shlex.quote(config.data.eval[0].path)}",
        "  # train on your own pairs: a file with prompt, chosen, rejected; a twentieth is held out",
        f"  {train} \\",
        "      data.train=my_pairs.jsonl 'data.eval=[]' data.eval_fraction=0.05",
        "  # the whole test-suite",
        "  bash tests/run.sh",
    ]
    return [line for line in lines if "checkpoints/" not in line or (run_dir / "checkpoints").exists()]


def _hanging(label: str, text: str) -> str:
    """A labelled paragraph, each of the text's own lines wrapped beside the label."""
    indent = " " * 8
    lines = [
        textwrap.fill(line.strip(), WIDTH, initial_indent=indent, subsequent_indent=indent)
        for line in text.splitlines()
        if line.strip()
    ]
    return f"{label:<8}" + ("\n".join(lines).strip() or "(nothing)")
