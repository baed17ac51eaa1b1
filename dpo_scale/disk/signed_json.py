"""Small JSON files with a checksum over their own text: manifests, and the mark of a finished run.

The checksum finds damage, not malice: whoever can change the text can also change the checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from dpo_scale.disk.atomic import write_atomically

_HASHES: dict[str, Callable[[bytes], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}


def write_signed(path: Path, content: dict[str, Any], *, hash_name: str = "xxh3_128") -> None:
    """Write `content` as readable JSON that ends in its checksum. The file appears whole or not at all.

    Args:
        hash_name: of the checksum: "xxh3_128" or "sha256".

    Raises:
        OSError: if it cannot be written.
    """
    write_atomically(path, [_signed(content, hash_name)])


def read_signed(path: Path, *, hash_name: str = "xxh3_128") -> dict[str, Any]:
    """The content of a signed file, without the checksum.

    Raises:
        OSError: if it cannot be read.
        ValueError: with the reason, if it is not, byte for byte, what was written.
    """
    text = path.read_bytes()
    try:
        content = json.loads(text)
        del content["checksum"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("not a manifest") from None
    # the exact text, not only its meaning: whatever byte changed, it is not the file that was written
    if _signed(content, hash_name) != text:
        raise ValueError("its checksum does not fit its content")
    return content


def _signed(content: dict[str, Any], hash_name: str) -> bytes:
    checksum = _HASHES[hash_name](json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, "checksum": checksum}, indent=1).encode() + b"\n"
