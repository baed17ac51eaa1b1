"""The files of a model folder before anything is loaded from them: sealed by us, unchanged, and not pickled.

A model that this program wrote has a manifest of its files. Other folders have none and are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dpo_scale import __version__
from dpo_scale.disk.sealed_folder import damage, describe_files, read_manifest, write_manifest
from dpo_scale.distributed import ranks
from dpo_scale.errors import ModelError
from dpo_scale.models.builtin import resolve_model_path

MODEL_MANIFEST = "dpo_scale_manifest.json"
MODEL_CARD = "README.md"  # people edit it, and no number comes from it


def seal_model(folder: Path) -> None:
    """Put a model's files on the disk and a manifest of them beside them.

    Raises:
        OSError: if that fails.
    """
    about = "Sizes and checksums of this model's files as dpo_scale wrote them. Remove this file if you change them."
    files = describe_files(folder)
    write_manifest(folder / MODEL_MANIFEST, {"about": about, "tool": f"dpo_scale {__version__}"}, files)


def looks_like_folder(path: str) -> bool:
    """Whether a model's path is meant as a folder of this machine; otherwise it is a hub id."""
    return path.startswith((".", "/", "~")) or Path(path).exists()


def check_models(paths: Iterable[str | None]) -> None:
    """Refuse models and adapters whose files are not what was written, or are pickled; rank 0 looks for all.

    Args:
        paths: as a config names them; what is no folder here (a hub id) is left to the loading.

    Raises:
        ModelError: on every rank, naming the file and what to do.
    """

    def look() -> None:
        for path in dict.fromkeys(path for path in paths if path is not None):
            check_model_folder(Path(resolve_model_path(path)))

    ranks.on_main(look)


def check_model_folder(folder: Path) -> None:
    """Refuse a local model folder that is damaged or pickled.

    Raises:
        ModelError: naming the file and what to do.
    """
    if not folder.is_dir():
        return
    pickled = sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model*.bin")])
    if pickled and not any(folder.glob("*.safetensors")):
        convert = f"M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('NEW_FOLDER')"
        raise ModelError(
            f"{pickled[0]}: a pickled file, which can run code when it is loaded; expected safetensors. If you trust "
            f'it, convert it once: python -c "from transformers import AutoModelForCausalLM as M; {convert}", and copy '
            "the tokenizer's files there"
        )
    if not (folder / MODEL_MANIFEST).exists():
        return
    manifest = read_manifest(folder / MODEL_MANIFEST, ModelError)
    for text in damage(folder, manifest["files"], checksums=True):
        if text.startswith(f"{MODEL_CARD} "):
            ranks.log(f"note: {folder}: {text}")
            continue
        raise ModelError(
            f"{folder}: {text}; write the model again (launch/train.py --resume on its run), or, if you changed it on "
            f"purpose, remove {MODEL_MANIFEST}"
        )
