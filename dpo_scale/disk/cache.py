"""Where the project keeps what can be made again: models it converted, tokenized data."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$DPO_SCALE_CACHE`, or `~/.cache/dpo_scale`."""
    return Path(os.environ.get("DPO_SCALE_CACHE") or "~/.cache/dpo_scale").expanduser().absolute()
