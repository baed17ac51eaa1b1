"""What a stored value is looked up by, as a table: changes of a run that must miss it, and changes that must not.

A book is filled with a row for every pair of one run. Then a line of the run's config, its files or its libraries is
changed, and the changed run's pairs are looked up in the book that it opens. The same under ZeRO-3, with the values
computed, is in `tests/distributed/test_store_keys.py`.
"""

from __future__ import annotations

import json
import random
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny import preference_rows, save_adapter, save_model, save_sharded, save_tokenizer, write_rows

from dpo_scale.data.dataset import load_pairs
from dpo_scale.models.load import load_tokenizers
from dpo_scale.reference import numerics
from dpo_scale.reference.compute import missing_rows
from dpo_scale.reference.modes import open_book
from dpo_scale.settings.tree import load_config

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
KNOWN = preference_rows(22)
NEW = preference_rows(10, seed=9)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Folder of a model, its data and a store that has all pairs of the run described by `base`."""
    folder = tmp_path_factory.mktemp("keys")
    save_model(folder / "start")
    save_adapter(folder / "start", folder / "adapter")
    write_rows(folder / "train.jsonl", KNOWN)
    write_rows(folder / "heldout.jsonl", preference_rows(5, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_SCALE_CACHE", str(folder / "cache"))
        config, datasets = load(base(folder))
        book = open_book(config)
        with book.writer() as writer:
            for data in datasets:
                sums = np.full((len(data), 2), -1, np.float32)
                writer.add(data.pair_keys, sums, data.lengths[:, 1:])
        yield folder


def base(folder):
    return [
        f"model.path={folder / 'start'}", "model.dtype=float32", f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'heldout.jsonl'}", "data.max_length=30", "data.max_prompt_length=9",
        "reference.mode=store", f"reference.store={folder / 'store'}", "output_dir=somewhere",
    ]  # fmt: skip


def load(overrides):
    config = load_config(None, overrides)
    data = load_pairs(config.data, load_tokenizers(config)[0], seed=config.train.seed, log=lambda line: None)
    return config, [data.train] if data.eval is None else [data.train, data.eval]


def contents(datasets):
    """The distinct pairs, as the token ids that a model sees."""
    pairs = (data[i] for data in datasets for i in range(len(data)))
    return {(tuple(pair.prompt_ids), tuple(pair.chosen_ids), tuple(pair.rejected_ids)) for pair in pairs}


def look_up(overrides):
    """(distinct pairs that the store lacks, distinct pairs) of a run."""
    config, datasets = load(overrides)
    missing = missing_rows(open_book(config), datasets, tokens=False)
    return sum(map(len, missing)), len(contents(datasets))


@pytest.fixture
def run(filled, tmp_path, monkeypatch):
    return Run(filled, tmp_path, monkeypatch)


class Run:
    """What changes are made of: the filled folder, one of the test's own, and how to patch."""

    def __init__(self, filled: Path, own: Path, patch: pytest.MonkeyPatch) -> None:
        self.filled, self.own, self.patch = filled, own, patch

    def train_on(self, *files: Path, more: str = "") -> list[str]:
        return [f"data.train=[{', '.join(f'{{path: {file}{more}}}' for file in files)}]"]

    def rows(self, name: str, rows: list[dict]) -> Path:
        return write_rows(self.own / name, rows)

    def library(self, name: str, other: str) -> None:
        self.patch.setattr(numerics, "version", lambda asked: other if asked == name else version(asked))


def weights_overwritten(run):
    folder = shutil.copytree(run.filled / "start", run.own / "model")
    assert look_up([*base(run.filled), f"model.path={folder}"])[0] == 0
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return [f"model.path={folder}"]


def tokenizer_of_other_merges(run):
    save_tokenizer(run.own, seed=4)
    tokens = json.loads((run.own / "tokenizer.json").read_text())
    tokens["model"]["merges"] = tokens["model"]["merges"][:20]
    (run.own / "tokenizer.json").write_text(json.dumps(tokens))
    return [f"model.tokenizer={run.own}"]


def logprobs_of_another_class(run):
    run.patch.setitem(numerics.PRECISION_CLASSES, "chunked", "bf16 logits")
    return []


def next_minor_version(name):
    def change(run):
        major, minor, *_ = version(name).split(".")
        run.library(name, f"{major}.{int(minor) + 1}.0")
        return []

    return change


# Each: (overrides, or what makes the change and returns them; whether the pairs change rather than the book).
MUST_MISS = {
    "weights overwritten behind the same path": (weights_overwritten, False),
    "another reference": (lambda run: [f"reference.model={save_model(run.own / 'other', seed=1)}"], False),
    "an adapter on the reference": (lambda run: [f"reference.adapter={run.filled / 'adapter'}"], False),
    "an adapter that the policy starts with": (lambda run: [f"lora.adapter={run.filled / 'adapter'}"], False),
    "dtype": (["model.dtype=bfloat16"], False),
    "attention": (["model.attn_implementation=eager"], False),
    "log-probs of another precision class": (logprobs_of_another_class, False),
    "minor version of torch": (next_minor_version("torch"), False),
    "minor version of transformers": (next_minor_version("transformers"), False),
    "longest prompt": (["data.max_prompt_length=8"], True),
    "longest pair": (["data.max_length=25"], True),
    "end of a prompt that is cut": (["data.truncation_mode=keep_start"], True),
    "chat template given": ([f"data.chat_template={json.dumps(TEMPLATE)}"], True),
    "no chat template": (["data.chat_template=none"], True),
    "tokenizer": (tokenizer_of_other_merges, True),
}


@pytest.mark.parametrize("change", MUST_MISS)
def test_what_changes_the_numbers_misses(run, change):
    make, changes_pairs = MUST_MISS[change]
    overrides = [*base(run.filled), *(make(run) if callable(make) else make)]
    missing, pairs = look_up(overrides)
    expected = pairs
    if changes_pairs:  # exactly the pairs of other token ids
        expected = len(contents(load(overrides)[1]) - contents(load(base(run.filled))[1]))
    assert missing == expected > 0


def same_weights_in_many_files(run):
    save_sharded(run.filled / "start", run.own / "sharded")
    return [f"model.path={run.own / 'sharded'}"]


def linked_model(run):
    (run.own / "link").symlink_to(run.filled / "start")
    return [f"model.path={run.own / 'link'}"]


def patch_release(run):
    major, minor, *_ = version("torch").split(".")
    run.library("torch", f"{major}.{minor}.99+cu130")
    return []


def renamed_as_another_format(run):
    (run.own / "other_name.json").write_text(json.dumps(KNOWN))
    return run.train_on(run.own / "other_name.json")


def renamed_columns(run):
    rows = [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"], "id": i} for i, r in enumerate(KNOWN)]
    columns = ", schema: prompt_completion, prompt_column: question, chosen_column: good, rejected_column: bad"
    return run.train_on(run.rows("columns.jsonl", rows), more=columns)


MUST_HIT = {
    "nothing": [],
    "learning rate": ["train.learning_rate=3e-4"],
    "beta": ["loss.beta=0.5"],
    "loss": ["loss.loss_type=[ipo, sft]"],
    "batch size": ["train.global_batch_size=16"],
    "micro-batch size": ["train.micro_batch_size=4"],
    "slots of a precompute's pass": ["reference.max_tokens_per_micro_batch=64"],
    "layout": ["data.layout=shared_prefix"],
    "output folder": ["output_dir=elsewhere"],
    "cache folder": lambda run: [f"data.cache_dir={run.own}"],
    "order": ["train.seed=7", "train.shuffle=false"],
    "shuffled file": lambda run: run.train_on(run.rows("s.jsonl", random.Random(0).sample(KNOWN, len(KNOWN)))),
    "split file": lambda run: run.train_on(run.rows("b.jsonl", KNOWN[9:]), run.rows("a.jsonl", KNOWN[:9])),
    "filtered file": lambda run: run.train_on(run.rows("f.jsonl", KNOWN[::3])),
    "renamed file": lambda run: run.train_on(run.rows("other_name.jsonl", KNOWN)),
    "file of another format": renamed_as_another_format,
    "names of columns": renamed_columns,
    "mixture": lambda run: run.train_on(run.filled / "train.jsonl", run.filled / "heldout.jsonl", more=", weight: 1.5"),
    "held-out share": ["data.eval=[]", "data.eval_fraction=0.4"],
    "overlong pairs dropped": ["data.overlong=drop"],
    "copy of the model": lambda run: [f"model.path={shutil.copytree(run.filled / 'start', run.own / 'copy')}"],
    "link to the model": linked_model,
    "weights in many files": same_weights_in_many_files,
    "reference named": lambda run: [f"reference.model={run.filled / 'start'}"],
    "copy of the tokenizer": lambda run: [
        f"model.tokenizer={shutil.copytree(run.filled / 'start', run.own / 'tokenizer')}"
    ],
    "policy's ZeRO stage": ["deepspeed.stage=3", "deepspeed.offload_param=cpu", "deepspeed.offload_optimizer=cpu"],
    "reference's ZeRO stage": ["reference.stage=3", "reference.offload_param=cpu"],
    "log-probs of the same precision class": ["logprobs.implementation=naive"],
    "activations and dropout of the policy": ["model.gradient_checkpointing=true", "model.disable_dropout=false"],
    "a new adapter on the policy": ["lora.r=4"],
    "an adapter on the policy alone": lambda run: [f"lora.adapter={run.filled / 'adapter'}", "reference.adapter=none"],
    "patch release": patch_release,
}


@pytest.mark.parametrize("change", MUST_HIT)
def test_what_does_not_change_the_numbers_hits(run, change):
    make = MUST_HIT[change]
    missing, pairs = look_up([*base(run.filled), *(make(run) if callable(make) else make)])
    assert missing == 0 and pairs > 5


def test_of_a_file_that_grew_only_the_new_rows_miss(run):
    grown = run.rows("grown.jsonl", [*NEW[:4], *KNOWN, *NEW[4:]])
    assert look_up([*base(run.filled), *run.train_on(grown)]) == (10, 37)


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt_oss"])
def test_stored_values_say_how_experts_were_computed_and_nothing_where_there_are_none(architecture, tmp_path):
    save_model(tmp_path / "model", architecture)
    config = load_config(None, [f"model.path={tmp_path / 'model'}", "data.train=none"])
    assert numerics.numerics_of(config).get("experts") == (None if architecture == "llama" else "grouped_mm")
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**described, "experts_implementation": "eager"}))
    assert numerics.numerics_of(config).get("experts") == (None if architecture == "llama" else "eager")
