"""What a book of values belongs to, and the readable file that says so.

A store holds one book for each (model, numerics, source). The book's folder is named after a hash of the three, so a
look-up never sees values of another model or precision. `manifest.json` tells a person what a book is. It is not an
index: the folder's listing says which shards there are, since a list would have to be agreed on by everyone who adds to
it. Every shard carries the same description, so a lost manifest can be written again.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpo_scale import __version__
from dpo_scale.disk.atomic import naming
from dpo_scale.disk.signed_json import read_signed, write_signed
from dpo_scale.errors import StoreError
from dpo_scale.reference.store_shard import FORMAT, FORMAT_VERSION, DamagedError, NewerVersionError

MANIFEST_FILE = "manifest.json"
_RECORDED = ("rows", "shards", "created", "updated", "tool")


@dataclass(frozen=True)
class BookKey:
    """What decides the values of a row: two books with equal keys hold the same numbers.

    Attributes:
        fingerprint: of the model (`dpo_scale.reference.fingerprint`).
        numerics: of the computation (`dpo_scale.reference.numerics`).
        source: "imported" for values that were computed elsewhere. Nothing here vouches for them, and only who asks
            for such a book finds it.
    """

    fingerprint: str
    numerics: dict[str, str]
    source: Literal["computed", "imported"] = "computed"

    @property
    def id(self) -> str:
        """32 hex digits, the name of the book's folder."""
        parts = [self.fingerprint, sorted(self.numerics.items()), self.source]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Manifest:
    """A book's description.

    Attributes:
        model: for the reader: where the model was found, its architecture, adapter and so on.
        created, updated: dates and times, UTC, ISO 8601.
        rows, shards: when `updated`; rows that two jobs both added count twice until they are compacted.
    """

    key: BookKey
    model: dict[str, str] = field(default_factory=dict)
    created: str = ""
    updated: str = ""
    rows: int = 0
    shards: int = 0
    tool: str = f"dpo_scale {__version__}"

    def shard_metadata(self, created: str, tool: str = f"dpo_scale {__version__}") -> dict[str, str]:
        """The description as text, for a shard's header."""
        return {
            "book": self.key.id,
            "fingerprint": self.key.fingerprint,
            "numerics": json.dumps(self.key.numerics, sort_keys=True),
            "source": self.key.source,
            "model": json.dumps(self.model, sort_keys=True),
            "created": created,
            "tool": tool,
        }

    @classmethod
    def from_shard_metadata(cls, metadata: dict[str, str]) -> Manifest:
        """The description that a shard carries."""
        source: Any = metadata["source"]
        key = BookKey(metadata["fingerprint"], json.loads(metadata["numerics"]), source)
        return cls(key, json.loads(metadata["model"]), metadata["created"], metadata["created"])


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the description into the book's folder.

    Raises:
        StoreError: if the folder cannot be written.
    """
    content = {
        "about": "Log-probs of preference pairs under one reference model. The shards beside this file hold them; "
        "rows and shards below are as of the last update.",
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "book": manifest.key.id,
        "model": {**manifest.model, "fingerprint": manifest.key.fingerprint},
        "numerics": manifest.key.numerics,
        "source": manifest.key.source,
        **{name: getattr(manifest, name) for name in _RECORDED},
    }
    with naming(folder, StoreError, to="written"):
        write_signed(folder / MANIFEST_FILE, content, hash_name="sha256")


def read_manifest(folder: Path) -> Manifest | None:
    """The description in a book's folder; None if there is none (yet).

    Raises:
        DamagedError, NewerVersionError, StoreError: if it cannot be used.
    """
    path = folder / MANIFEST_FILE
    try:
        with naming(path, StoreError, to="read"):
            content = read_signed(path, hash_name="sha256") if path.exists() else None
        if content is None:
            return None
        if content["format"] != FORMAT:
            raise DamagedError(path, f"format {content['format']!r}, expected {FORMAT!r}")
        if content["format_version"] != FORMAT_VERSION:
            raise NewerVersionError(path, content["format_version"])
        model = dict(content["model"])
        key = BookKey(model.pop("fingerprint"), content["numerics"], content["source"])
        manifest = Manifest(key, model, **{name: content[name] for name in _RECORDED})
    except StoreError:
        raise
    except (KeyError, TypeError, AttributeError):
        raise DamagedError(path, "not a manifest") from None
    except ValueError as reason:
        raise DamagedError(path, str(reason)) from None
    if key.id != folder.name:
        raise DamagedError(path, f"it describes book {key.id}, but lies in the folder of another")
    return manifest
