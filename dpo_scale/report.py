"""What a run learnt, on one screen: held-out metrics before and after, and answers before and after, side by side.

Metrics say that preferences moved; only answers say whether that is what was meant. Both models answer the same
held-out prompts greedily, so that the only difference is the training.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from dpo_scale.config import Config, load_config
from dpo_scale.errors import UserError

WIDTH = 90
NUM_PROMPTS = 3
MAX_NEW_TOKENS = 72

# metric, what a reader calls it, how it is shown
TABLE_ROWS = (
    ("rewards/accuracies", "reward accuracy", "{:.1%}"),
    ("rewards/margins", "reward margin", "{:.3f}"),
    ("accuracy/policy", "policy accuracy", "{:.1%}"),
    ("loss", "loss", "{:.4f}"),
)
EXPLANATION = (
    "Reward accuracy: pairs where training moved the model towards the chosen answer rather than the rejected one. "
    "Reward margin: how far, times beta. At the start the model is its own reference, so every margin is exactly 0 "
    "and, as only margins above 0 count, the accuracy is 0 by definition. Policy accuracy: pairs whose chosen answer "
    "the model finds likelier than the rejected one, whole answers compared."
)


def print_report(run_dir: Path) -> None:
    """Print the report of a finished run with held-out data.

    Raises:
        UserError: if the folder is not that of a finished run, or the run had no held-out data.
    """
    from dpo_scale.export import MODEL_DIR
    from dpo_scale.tracking import METRICS_FILE, read_metrics
    from dpo_scale.trainer import CONFIG_FILE

    for needed in (CONFIG_FILE, METRICS_FILE, MODEL_DIR):
        if not (run_dir / needed).exists():
            raise UserError(f"{run_dir}: no {needed} there; expected the folder of a finished run")
    config = load_config(run_dir / CONFIG_FILE)
    evaluations = [record for record in read_metrics(run_dir / METRICS_FILE) if record["phase"] == "eval"]
    if len(evaluations) < 2:
        raise UserError(f"{run_dir}: {len(evaluations)} evaluations in {METRICS_FILE}; expected one before and one after")
    print("\n".join(metrics_table(evaluations[0], evaluations[-1])))

    prompts = held_out_prompts(config, NUM_PROMPTS)
    before = greedy_answers(config.model.path, prompts)
    after = greedy_answers(str(run_dir / MODEL_DIR), prompts)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        print()
        print("\n".join(_labelled("prompt", prompt) + _labelled("before", old) + _labelled("after", new)))
    print("\n".join(["", *what_is_where(run_dir), "", *what_next(run_dir, config)]))


def metrics_table(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Lines of a plain-text table of two evaluations' metrics; a metric that either lacks is left out."""
    lines = [f"{'held-out pairs: ' + format(after['pairs'], '.0f'):<30}{'before':>12}{'after':>12}", "-" * 54]
    for name, title, shown in TABLE_ROWS:
        if before.get(name) is not None and after.get(name) is not None:
            lines.append(f"{title:<30}{shown.format(before[name]):>12}{shown.format(after[name]):>12}")
    return [*lines, "", *textwrap.wrap(EXPLANATION, WIDTH)]


def held_out_prompts(config: Config, count: int) -> list[Any]:
    """`count` prompts spread evenly over the run's held-out data, the same ones every time."""
    raise NotImplementedError


def greedy_answers(path: str, prompts: list[Any]) -> list[str]:
    """A model's greedy answers to prompts, all in one batch; one that was cut ends in "...".

    Args:
        path: a model folder, hub id or `builtin:` name.
        prompts: each a text or a list of messages.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo_scale.models.builtin import resolve_model_path

    path = resolve_model_path(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device).eval()
    texts = [_as_text(tokenizer, prompt) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=tokenizer.chat_template is None)
    inputs = inputs.to(device)
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    answers = []
    for tokens in output[:, inputs["input_ids"].shape[1] :].tolist():
        text = " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())
        answers.append(text if tokenizer.eos_token_id in tokens else f"{text} ...")
    return answers
