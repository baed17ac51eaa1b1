"""A model's fingerprint: the same however the model is saved, another as soon as one number of it is."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_model

from dpo_scale.errors import ModelError
from dpo_scale.reference import fingerprint as module
from dpo_scale.reference.fingerprint import hash_tensors, weights_fingerprint


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": save_model(root / "llama"),
        "tied": save_model(root / "tied", tied=True),
        "gpt2": save_model(root / "gpt2", "gpt2", tied=True),
    }


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def copy(models, tmp_path):
    """Copies a model's folder, with some tensors and config entries changed."""

    def make(name: str, change=None, config: dict | None = None) -> str:
        folder = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(models[name], folder)
        if change is not None:
            tensors = load_file(folder / "model.safetensors")
            changed = change(tensors)
            save_file(tensors if changed is None else changed, folder / "model.safetensors", {"format": "pt"})
        if config is not None:
            settings = json.loads((folder / "config.json").read_text()) | config
            (folder / "config.json").write_text(json.dumps(settings))
        return str(folder)

    return make


@pytest.fixture
def fingerprint(cache):
    return lambda folder, **settings: weights_fingerprint(str(folder), cache_dir=cache, **settings)


def test_path_file_names_sharding_and_order_of_tensors_make_no_difference(models, copy, fingerprint, tmp_path):
    from transformers import AutoModelForCausalLM

    expected = fingerprint(models["llama"])
    assert fingerprint(copy("llama")) == expected
    assert fingerprint(copy("llama", lambda t: dict(reversed(t.items())))) == expected
    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert fingerprint(tmp_path / "sharded") == expected


def test_relative_and_linked_paths_make_no_difference(models, fingerprint, tmp_path, monkeypatch):
    expected = fingerprint(models["llama"])
    (tmp_path / "link").symlink_to(models["llama"])
    assert fingerprint(tmp_path / "link") == expected
    monkeypatch.chdir(models["llama"].parent)
    assert fingerprint("llama") == expected


def test_a_change_of_any_one_tensor_changes_it(models, copy, fingerprint):
    with safe_open(models["llama"] / "model.safetensors", "pt") as file:
        names = list(file.keys())
    seen = {fingerprint(models["llama"])}
    for name in names:

        def change(tensors, name=name):
            flat = tensors[name].view(-1)
            flat[len(flat) // 2] = torch.nextafter(flat[len(flat) // 2], torch.tensor(torch.inf))

        seen.add(fingerprint(copy("llama", change)))
    assert len(seen) == len(names) + 1


def test_dtype_shape_and_names_of_weights_change_it(models, copy, fingerprint):
    name = "model.layers.0.self_attn.q_proj.weight"
    other = "model.layers.1.self_attn.q_proj.weight"
    changes = [
        lambda t: {n: v.bfloat16() for n, v in t.items()},
        lambda t: {**t, name: t[name].view(torch.int32)},  # the same bytes under another dtype
        lambda t: {**t, name: t[name].reshape(64, 16)},  # the same bytes in another shape
        lambda t: {**t, name: t[other].clone(), other: t[name].clone()},  # the same tensors, swapped
        lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"},
    ]
    seen = [fingerprint(models["llama"]), *(fingerprint(copy("llama", change)) for change in changes)]
    assert len(set(seen)) == len(changes) + 1


@pytest.mark.parametrize(
    "entry",
    [
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"num_attention_heads": 8},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
    ],
    ids=lambda entry: next(iter(entry)),
)
def test_a_config_entry_that_changes_the_numbers_changes_it(models, copy, fingerprint, entry):
    assert fingerprint(copy("llama", config=entry)) != fingerprint(models["llama"])


def test_config_entries_that_change_no_number_do_not(models, copy, fingerprint):
    entries = {
        "transformers_version": "4.40.0",
        "_name_or_path": "somewhere/else",
        "use_cache": False,
        "dtype": "bfloat16",
        "attention_dropout": 0.3,
        "pad_token_id": 7,
        "architectures": None,
        "initializer_range": 0.5,
    }
    assert fingerprint(copy("llama", config=entries)) == fingerprint(models["llama"])


def test_a_default_written_out_or_left_out_of_the_config_is_the_same(models, copy, fingerprint):
    folder = Path(copy("llama"))
    settings = json.loads((folder / "config.json").read_text())
    assert settings.pop("mlp_bias") is False and settings.pop("hidden_act") == "silu"
    (folder / "config.json").write_text(json.dumps(settings))
    assert fingerprint(folder) == fingerprint(models["llama"])


@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_a_tied_head_may_be_in_the_file_or_not_but_an_own_head_counts(models, copy, fingerprint, name):
    embedding = {"tied": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}[name]
    expected = fingerprint(models[name])
    assert "lm_head.weight" not in load_file(models[name] / "model.safetensors")
    assert fingerprint(copy(name, lambda t: {**t, "lm_head.weight": t[embedding].clone()})) == expected
    assert fingerprint(copy(name, lambda t: {**t, "lm_head.weight": t[embedding] + 1})) != expected


def test_a_backbone_saved_without_its_prefix_is_the_same_model(models, copy, fingerprint):
    bare = copy("gpt2", lambda t: {n.removeprefix("transformer."): v for n, v in t.items()})
    assert fingerprint(bare) == fingerprint(models["gpt2"])


def age(folder: str | Path) -> None:
    """Make files look as if they had been there for a while; the change time cannot be set, so it is waited for."""
    time.sleep(module._SETTLED_SECONDS + 0.1)


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """The files that were hashed."""
    files: list[Path] = []
    monkeypatch.setattr(module, "hash_tensors", lambda path: files.append(path) or hash_tensors(path))
    return files


def test_known_files_are_not_read_again_and_overwritten_ones_are(copy, fingerprint, hashed):
    folder = copy("llama")
    age(folder)
    first = fingerprint(folder)
    assert fingerprint(folder) == first and len(hashed) == 1

    # in place, the same size, and the old time stamp put back
    file = Path(folder) / "model.safetensors"
    before = file.stat()
    with open(file, "r+b") as stream:
        stream.seek(before.st_size - 3)
        byte = stream.read(1)
        stream.seek(before.st_size - 3)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint(folder) != first and len(hashed) == 2


def test_files_too_young_to_be_told_apart_by_their_time_are_not_remembered(copy, fingerprint, hashed):
    folder = copy("llama", lambda t: None)
    assert fingerprint(folder) == fingerprint(folder) and len(hashed) == 2


def test_what_version_0_1_remembered_of_a_file_is_made_anew(copy, fingerprint, hashed, cache):
    folder = copy("llama")
    age(folder)
    expected = fingerprint(folder)
    (entry,) = cache.iterdir()
    entry.write_text(json.dumps({"file": "f", "tensors": {"a": "0" * 64}, "checksum": "0" * 64}, indent=0))
    assert fingerprint(folder) == fingerprint(folder) == expected and len(hashed) == 2


def test_a_damaged_memory_of_known_files_is_not_believed(models, cache):
    expected = weights_fingerprint(str(models["llama"]), cache_dir=cache)
    age(models["llama"])
    weights_fingerprint(str(models["llama"]), cache_dir=cache)
    (entry,) = cache.iterdir()
    text = entry.read_text()
    digest = json.loads(text)["tensors"]["model.norm.weight"]
    for damaged in (text.replace(digest, "0" * 64), text[:100], ""):
        entry.write_text(damaged)
        assert weights_fingerprint(str(models["llama"]), cache_dir=cache) == expected


def test_the_size_of_reads_and_the_number_of_threads_make_no_difference(models, monkeypatch, tmp_path):
    save_file({"big": torch.arange(300_000), "empty": torch.zeros(0, 3), "one": torch.ones(())}, tmp_path / "x")
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 16)
    expected = hash_tensors(tmp_path / "x")
    assert len(set(expected.values())) == 3
    monkeypatch.setattr(module, "MAX_THREADS", 1)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:1000]], at))
    assert hash_tensors(tmp_path / "x") == expected


def test_an_adapter_on_top_is_another_model(models, fingerprint, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def save(name: str, value: float, **settings) -> str:
        model = AutoModelForCausalLM.from_pretrained(models["llama"])
        lora = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], **settings))
        for key, parameter in lora.named_parameters():
            if "lora_" in key:
                torch.nn.init.constant_(parameter, value)
        lora.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    base = fingerprint(models["llama"])
    first = fingerprint(models["llama"], adapter=save("a", 0.1, r=2))
    assert first != base
    assert fingerprint(models["llama"], adapter=save("b", 0.1, r=2, lora_dropout=0.5)) == first
    assert fingerprint(models["llama"], adapter=save("c", 0.2, r=2)) != first
    assert fingerprint(models["llama"], adapter=save("d", 0.1, r=2, lora_alpha=99)) != first
    with pytest.raises(ModelError, match="expected a PEFT adapter"):
        fingerprint(models["llama"], adapter=str(models["llama"]))


def test_model_code_counts_only_where_it_is_run(copy, fingerprint):
    folder = Path(copy("llama"))
    plain, trusted = fingerprint(folder), fingerprint(folder, trust_remote_code=True)
    (folder / "modeling_own.py").write_text("SCALE = 1\n")
    assert fingerprint(folder) == plain
    own = fingerprint(folder, trust_remote_code=True)
    (folder / "modeling_own.py").write_text("SCALE = 2\n")
    assert len({trusted, own, fingerprint(folder, trust_remote_code=True)}) == 3


def test_hub_ids_are_the_files_in_the_hub_cache(models, fingerprint, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(models["llama"], snapshot)
    refs = tmp_path / "hub" / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    import huggingface_hub.constants
    import transformers.utils.hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
        if hasattr(transformers.utils.hub.constants, name):
            monkeypatch.setattr(transformers.utils.hub.constants, name, str(tmp_path / "hub"))
    assert fingerprint("some/model") == fingerprint(models["llama"])


def test_folders_without_usable_weights_are_named(models, copy, fingerprint):
    folder = Path(copy("llama"))
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:5], whole[:-1], whole + b"\0", b"\xff" * 100, b"pickle" * 20):
        file.write_bytes(content)
        with pytest.raises(ModelError, match="model.safetensors: not a safetensors file, or not a whole one"):
            fingerprint(folder)
    file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="neither model.safetensors nor .*index.json"):
        fingerprint(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
    with pytest.raises(ModelError, match="part-1.safetensors is missing"):
        fingerprint(folder)
    index.write_text("[]")
    with pytest.raises(ModelError, match="cannot be read as an index"):
        fingerprint(folder)


def test_a_file_that_changes_while_it_is_read_is_refused(copy, fingerprint, monkeypatch):
    folder = Path(copy("llama"))
    real = module.hash_tensors

    def hash_and_touch(path):
        tensors = real(path)
        os.utime(path)
        return tensors

    monkeypatch.setattr(module, "hash_tensors", hash_and_touch)
    with pytest.raises(ModelError, match="changed while it was read"):
        fingerprint(folder)
