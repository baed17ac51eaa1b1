"""Inputs that nobody meant: rows, configs, DeepSpeed JSON, chat templates, model folders; drawn by hypothesis.

Each must be taken, or refused with one of our own errors, within seconds. Everything runs in this process, up to where
the program would start to train.
"""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from faults.cases import Outcome
from faults.rig import overrides
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from dpo_scale.data.dataset import load_pairs
from dpo_scale.errors import UserError
from dpo_scale.models.files import check_model_folder
from dpo_scale.models.load import check_vocabulary, load_tokenizers
from dpo_scale.settings.deepspeed import KNOWN_KEYS
from dpo_scale.settings.reader import list_keys
from dpo_scale.settings.tree import Config, load_config

SECONDS_EACH = 20

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
texts = st.text(min_size=1, max_size=30) | st.sampled_from(["", " ", "\x00", "\ud800", "<|im_end|>", "a" * 5000])
messages = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": texts | st.sampled_from(["user", "assistant", "tool"]), "content": values}
    ),
    max_size=3,
)
fields = ["prompt", "chosen", "rejected", "conversations", "messages", "tools", "system", "question", "other"]
rows = st.dictionaries(st.sampled_from(fields), texts | messages | values, max_size=5)
proper_rows = st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts})
keys = st.sampled_from(list_keys(Config))
zero_keys = ["stage", "offload_optimizer", "offload_param", "reduce_bucket_size", "overlap_comm", "unknown"]
deepspeed_jsons = st.dictionaries(
    st.sampled_from(sorted(KNOWN_KEYS)) | st.text(max_size=10),
    values | st.dictionaries(st.sampled_from([*zero_keys, "enabled", "type", "params"]), values, max_size=3),
    max_size=4,
)
template_parts = [
    *(
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ m['content'] }}",
        "{{ m.role }}",
        "{{ messages[5].x }}",
        "{{ m }}",
    ),
    *("{% if a %}", "{% endif %}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}", "{{"),
    *("%}", "\n", "x", "{{ m['content'] | tojson }}", "{% set x = namespace(a=1) %}", "{{ x.a }}", "{% include 'x' %}"),
    *("{% if add_generation_prompt %}A:{% endif %}", "{{ range(10**9) | list }}", "{% generation %}", "{# a #}"),
]
proper_template = ["{% for m in messages %}", "{{ m.role }}", "{{ m['content'] }}", "{% endfor %}"]
proper_template += ["{% if add_generation_prompt %}", "assistant", "{% endif %}"]


@st.composite
def templates(draw: Any) -> str:
    """A proper template with some parts too many, or any parts at all."""
    parts = draw(st.lists(st.sampled_from(template_parts), max_size=3))
    made = list(proper_template) if draw(st.booleans()) else []
    for part in parts:
        made.insert(draw(st.integers(0, len(made))), part)
    return "".join(made)


def malformed(folder: Path, seed: int, each: int) -> Outcome:
    """Draw `each` inputs of each kind."""
    outcome = Outcome("malformed inputs")
    base = overrides(folder)
    refused = {}
    for kind, strategy, take in (
        ("rows", st.tuples(st.lists(proper_rows | rows, min_size=1, max_size=4), st.booleans()), _take_rows),
        ("bytes for rows", st.binary(max_size=200), _take_bytes),
        ("config", st.dictionaries(keys, values, max_size=4), _take_config),
        ("text for a config", st.text(max_size=60) | st.binary(max_size=60), _take_config_text),
        ("DeepSpeed JSON", deepspeed_jsons, _take_deepspeed),
        ("chat template", templates(), _take_template),
        ("model folder", st.tuples(st.integers(0, 9), st.binary(max_size=40), st.floats(0, 1)), _take_model),
    ):
        refused[kind] = _try_all(outcome, kind, strategy, lambda drawn, take=take: take(base, drawn), each, seed)
    said = ", ".join(f"{count} of {each} {kind}" for kind, count in refused.items())
    outcome.note = f"refused: {said}"
    return outcome


def _try_all(outcome: Outcome, kind: str, strategy: Any, take: Callable[[Any], None], count: int, seed: int) -> int:
    """Feed drawn inputs to `take`; how many were refused."""
    refused = 0

    @hypothesis_seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(strategy)
    def each(drawn: Any) -> None:
        def one() -> None:
            nonlocal refused
            try:
                with _time_limit(), tempfile.TemporaryDirectory() as here:
                    take((Path(here), drawn))
            except UserError as error:
                refused += 1
                assert len(str(error)) < 5000, "an error that floods"
                str(error).encode("utf-8", "backslashreplace")

        outcome.attempt(f"{kind} {drawn!r:.300}", one)

    each()
    return refused


@contextmanager
def _time_limit():
    def ring(*_: Any) -> None:
        raise TimeoutError(f"not done after {SECONDS_EACH} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS_EACH)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _load(base: list[str], here: Path, *more: str) -> None:
    """What a run does before it loads weights."""
    config = load_config(None, [*base, f"data.cache_dir={here / 'cache'}", *more])
    check_model_folder(Path(config.model.path))
    tokenizer, model_config = load_tokenizers(config)
    check_vocabulary(tokenizer, model_config)
    pairs = load_pairs(replace(config.data, eval=[]), tokenizer, seed=0, log=lambda line: None)
    for k in range(len(pairs.train)):
        pairs.train[k]


def _take_rows(base: list[str], drawn: tuple[Path, tuple[list[dict], bool]]) -> None:
    here, (made, skips) = drawn
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    _load(base, here, f"data.train={here / 'rows.jsonl'}", f"data.on_bad_row={'skip' if skips else 'error'}")


def _take_bytes(base: list[str], drawn: tuple[Path, bytes]) -> None:
    here, made = drawn
    name = ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.jsonl.gz")[len(made) % 5]
    (here / name).write_bytes(made)
    _load(base, here, f"data.train={here / name}")


def _take_config(base: list[str], drawn: tuple[Path, dict[str, Any]]) -> None:
    here, made = drawn
    tree: dict[str, Any] = {}
    for key, value in made.items():
        section, _, name = key.rpartition(".")
        place = tree
        for part in filter(None, section.split(".")):
            place = place.setdefault(part, {})
        place[name] = value
    (here / "mine.yaml").write_text(yaml.safe_dump(tree))
    load_config(here / "mine.yaml", [f"{key}" for key in base if key.split("=")[0] not in made])


def _take_config_text(base: list[str], drawn: tuple[Path, str | bytes]) -> None:
    here, made = drawn
    data = made if isinstance(made, bytes) else made.encode("utf-8", "surrogatepass")
    (here / "mine.yaml").write_bytes(data)
    load_config(here / "mine.yaml", base)


def _take_deepspeed(base: list[str], drawn: tuple[Path, dict[str, Any]]) -> None:
    here, made = drawn
    (here / "zero.json").write_text(json.dumps(made))
    without_stage = [text for text in base if not text.startswith("deepspeed.")]
    load_config(None, [*without_stage, f"deepspeed.config={here / 'zero.json'}"])


def _take_template(base: list[str], drawn: tuple[Path, str]) -> None:
    here, made = drawn
    (here / "template.jinja").write_text(made)
    _load(base, here, f"data.chat_template={here / 'template.jinja'}")


def _take_model(base: list[str], drawn: tuple[Path, tuple[int, bytes, float]]) -> None:
    here, (which, noise, at) = drawn
    start = next(text for text in base if text.startswith("model.path=")).split("=", 1)[1]
    shutil.copytree(start, here / "model")
    files = sorted(path for path in (here / "model").iterdir() if path.suffix != ".safetensors")
    file = files[which % len(files)]
    data = file.read_bytes()
    place = int(at * len(data))
    file.write_bytes(data[:place] + noise + data[place + len(noise) :] if which < 7 else data[:place])
    _load(base, here, f"model.path={here / 'model'}")
