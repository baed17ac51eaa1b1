"""Which model a reference value belongs to: a hash of what decides the model's numbers, and of nothing else.

It is computed from the safetensors files on disk. Loaded weights would not do: they may be cast, on several ranks, or
sharded by ZeRO-3 (and then look empty). Tensors are hashed one by one and put together by name, so it makes no
difference how they are spread over files or what the files are called. Hashing runs at the speed of the disk, and is
done once: the hashes of a file's tensors are remembered with the file's identity.

Two models are the same if they have equal names, shapes, dtypes and contents of all weights, an equal config apart from
entries that don't enter a forward pass, the same model code if the folder brings its own, and the same adapter.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpo_scale.disk.atomic import naming
from dpo_scale.disk.cache import cache_folder
from dpo_scale.disk.signed_json import read_signed, write_signed
from dpo_scale.errors import ModelError
from dpo_scale.models.builtin import resolve_model_path
from dpo_scale.progress import note_activity

FINGERPRINT_VERSION = 1  # raise it when the same model would get another fingerprint
CHUNK_BYTES = 32 << 20  # of a tensor that one thread hashes at a time; part of the fingerprint's definition
MAX_THREADS = 16
# A file may be written again without a change of its time stamp while that is younger than the clock's tick.
_SETTLED_SECONDS = 2.0

# Entries of config.json that no forward pass of a causal language model in evaluation mode reads, or that the weights'
# own headers state better. Entries that begin with an underscore are ignored too.
_CONFIG_IGNORED = set(
    """
    architectures bos_token_id dtype eos_token_id finetuning_task gradient_checkpointing id2label initializer_range
    label2id output_attentions output_hidden_states pad_token_id prefix problem_type return_dict sep_token_id
    task_specific_params tokenizer_class torch_dtype transformers_version unk_token_id use_cache
    """.split()
)
_ADAPTER_IGNORED = set(
    "auto_mapping base_model_name_or_path inference_mode peft_version revision runtime_config task_type".split()
)
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def weights_fingerprint(
    path: str,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: Path | None = None,
) -> str:
    """The fingerprint of a model as `load_causal_lm` would load it from the same path, 64 hex digits.

    Args:
        path: folder, hub id (its files are fetched as for loading) or `builtin:` name.
        revision: of a hub id.
        adapter: folder or hub id of a PEFT adapter on top of it.
        trust_remote_code: the folder may bring its own model code, which then belongs to the fingerprint.
        cache_dir: where the hashes of known files are remembered; the project's cache folder if None.

    Raises:
        ModelError: if there are no safetensors weights, a file is damaged, or one changes while it is read.
    """
    from dpo_scale.models.load import load_model_config

    known = cache_dir or cache_folder() / "fingerprints"
    folder = resolve_model_path(path)
    # with the defaults of its kind filled in, so that writing them out makes no difference
    config = load_model_config(folder, revision=revision, trust_remote_code=trust_remote_code)
    tensors = _hash_files(_weight_files(folder, revision), known)
    return _digest(
        [
            FINGERPRINT_VERSION,
            _digest(sorted(_canonical_names(tensors, config).items())),
            _digest(_relevant(config.to_dict(), _CONFIG_IGNORED)),
            _model_code(folder, revision) if trust_remote_code else "",
            _adapter_digest(adapter, known) if adapter is not None else "",
        ]
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _relevant(config: dict[str, Any], ignored: set[str]) -> dict[str, Any]:
    """The entries that decide numbers, in nested configs too; dropout is off wherever a reference is computed."""
    return {
        name: _relevant(value, ignored) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in ignored and value is not None and not re.search("^_|dropout|pdrop", name)
    }


def _canonical_names(tensors: dict[str, str], config: Any) -> dict[str, str]:
    """Digests by the names that the model itself uses, however it was saved.

    A backbone may have been saved with or without the prefix that the whole model gives it. A head that is tied to the
    embedding may be in the files or not.
    """
    prefix, tied = _model_names(config)
    names = {name: name.removeprefix(prefix) for name in tensors}
    if len(set(names.values())) < len(names):
        names = {name: name for name in tensors}
    canonical = {names[name]: digest for name, digest in tensors.items()}
    for head, embedding in tied.items():
        head, embedding = head.removeprefix(prefix), embedding.removeprefix(prefix)
        if canonical.get(head) is not None and canonical.get(head) == canonical.get(embedding):
            del canonical[head]
    return canonical


def _model_names(config: Any) -> tuple[str, dict[str, str]]:
    """The backbone's prefix, and which weights are tied to which, of the class that a config is loaded as."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:  # a model that brings its own code
        return "", {}
    prefix = model_class.base_model_prefix
    tied = getattr(model_class, "_tied_weights_keys", None) if config.get_text_config().tie_word_embeddings else None
    return f"{prefix}." if prefix else "", dict(tied or {})


def _weight_files(folder: str, revision: str | None) -> list[Path]:
    single, index = (_find(folder, name, revision) for name in (WEIGHTS, WEIGHTS_INDEX))
    if single is not None:
        return [single]
    if index is None:
        raise ModelError(
            f"{folder}: its weights cannot be read: neither {WEIGHTS} nor {WEIGHTS_INDEX} there; expected safetensors"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index}: cannot be read as an index of weight files") from None
    files = {name: _find(folder, name, revision) for name in names}
    for name, file in files.items():
        if file is None:
            raise ModelError(f"{folder}: {name} is missing, which {WEIGHTS_INDEX} names")
    return list(filter(None, files.values()))


def _find(folder: str, name: str, revision: str | None) -> Path | None:
    """A file of a model folder or hub id, fetched from the hub if need be, as loading the model would."""
    if Path(folder).is_dir():
        path = Path(folder) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            folder,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise ModelError(f"{folder}: {' '.join(str(error).split())[:300]}") from None
    return Path(found) if found is not None else None


def _model_code(folder: str, revision: str | None) -> str:
    """Which model code a folder or hub id brings along: a hash of its Python files, or the hub's commit."""
    if not Path(folder).is_dir():
        config = _find(folder, "config.json", revision)
        return config.parent.name if config is not None else ""
    files = sorted(Path(folder).glob("*.py"))
    return _digest([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]) if files else ""


def _adapter_digest(adapter: str, known: Path) -> str:
    weights, config = (_find(adapter, name, None) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG))
    if weights is None or config is None:
        raise ModelError(f"{adapter}: expected a PEFT adapter, with {ADAPTER_WEIGHTS} and {ADAPTER_CONFIG}")
    try:
        settings = _relevant(json.loads(config.read_text(encoding="utf-8")), _ADAPTER_IGNORED)
    except (OSError, ValueError, AttributeError):
        raise ModelError(f"{config}: cannot be read as an adapter's config") from None
    # lists of modules are sets, which PEFT writes in any order
    settings = {name: sorted(map(str, v)) if isinstance(v, list) else v for name, v in settings.items()}
    return _digest([sorted(_hash_files([weights], known).items()), settings])


def _hash_files(files: list[Path], known: Path) -> dict[str, str]:
    """Digest of every tensor in the files, by name."""
    tensors: dict[str, str] = {}
    for file in files:
        of_file = _hash_file(file.resolve(), known)
        twice = sorted(tensors.keys() & of_file.keys())
        if twice:
            raise ModelError(f"{file}: has {twice[0]}, which another file of the model has too")
        tensors |= of_file
    return tensors


def _hash_file(path: Path, known: Path) -> dict[str, str]:
    """`hash_tensors`, remembered in the folder `known` by the file's path, inode, size and times."""
    before = _identity(path)
    entry = known / f"{_digest([FINGERPRINT_VERSION, CHUNK_BYTES, before])}.json"
    try:
        return read_signed(entry)["tensors"]
    except (OSError, ValueError):
        pass  # not known yet, or damaged: hashed (again) either way
    began = time.time()
    tensors = hash_tensors(path)
    if _identity(path) != before:
        raise ModelError(f"{path}: changed while it was read; is something still writing it?")
    if began - max(before[3], before[4]) / 1e9 > _SETTLED_SECONDS:
        with naming(known, ModelError, to="written", advice="set DPO_SCALE_CACHE to a folder that can"):
            write_signed(entry, {"file": str(path), "tensors": tensors})
    return tensors


def _identity(path: Path) -> tuple[str, int, int, int, int]:
    """What changes when a file's content does: the inode if it is replaced, a time stamp if it is overwritten."""
    with naming(path, ModelError, to="read"):
        status = path.stat()
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def hash_tensors(path: Path) -> dict[str, str]:
    """SHA-256 of each tensor of a safetensors file (name, dtype, shape, bytes by chunks), on all cores.

    Raises:
        ModelError: if the file is no safetensors file, or is cut off.
    """
    try:
        with naming(path, ModelError, to="read"), open(path, "rb") as file:
            with safe_open(path, "np"):  # checks the header, and that the tensors fill the file
                pass
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            return _hash_layout(file.fileno(), header, 8 + length)
    except (SafetensorError, EOFError):
        raise ModelError(f"{path}: not a safetensors file, or not a whole one") from None


def _hash_layout(descriptor: int, header: dict[str, Any], data: int) -> dict[str, str]:
    """Digests of the tensors that a header describes; their bytes begin at `data`."""
    chunks = []
    for name, entry in header.items():
        first, last = (data + offset for offset in entry["data_offsets"])
        chunks += [(name, begin, min(begin + CHUNK_BYTES, last)) for begin in range(first, last, CHUNK_BYTES)]
    buffers = threading.local()

    def hash_chunk(chunk: tuple[str, int, int]) -> str:
        _, begin, end = chunk
        if not hasattr(buffers, "memory"):
            buffers.memory = memoryview(bytearray(CHUNK_BYTES))
        digest = hashlib.sha256()
        while begin < end:  # a read may give less than it was asked for
            count = os.preadv(descriptor, [buffers.memory[: end - begin]], begin)
            if count == 0:
                raise EOFError  # the file became shorter while it was read
            digest.update(buffers.memory[:count])
            begin += count
        note_activity()
        return digest.hexdigest()

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(cores, MAX_THREADS)) as pool:
        digests = list(pool.map(hash_chunk, chunks))
    parts: dict[str, list[str]] = {name: [] for name in header}
    for (name, _, _), digest in zip(chunks, digests, strict=True):
        parts[name].append(digest)
    return {name: _digest([entry["dtype"], entry["shape"], parts[name]]) for name, entry in header.items()}
