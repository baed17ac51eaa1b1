"""One setting, described once: default, meaning, unit and range stand together beside the field.

Everything else reads that description: the check of a value and its error message (`dpo_scale.settings.reader`),
`--help`, and docs/settings.md. Dataclass metadata is enough for this. Pydantic's dataclasses would say it in no fewer
lines, would import in more time than `--help` takes now, and would need their messages and strictness rewritten.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a field means and which numbers it takes. Null or a word, where its type allows it, is in every range."""

    meaning: str
    unit: str = ""  # what a number counts: pairs, steps, seconds
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def allows(self, value: Any) -> bool:
        """Whether a value of the field's type lies in its range."""
        return value is None or isinstance(value, str) or all(holds(value, limit) for _, limit, holds in self._limits())

    def expected(self, kind: str) -> str:
        """A field's type with its unit and range, e.g. `null or a whole number of steps, at least 1`."""
        unit = f" of {self.unit}" if self.unit else ""
        limits = " and ".join(f"{words} {limit}" for words, limit, _ in self._limits())
        return f"{kind}{unit}{', ' if limits else ''}{limits}"

    def _limits(self) -> list[tuple[str, float, Any]]:
        limits = (
            ("at least", self.at_least, operator.ge),
            ("above", self.above, operator.gt),
            ("at most", self.at_most, operator.le),
            ("below", self.below, operator.lt),
        )
        return [(words, limit, holds) for words, limit, holds in limits if limit is not None]


def setting(default: Any, meaning: str, **described: Any) -> Any:
    """A dataclass field with its description; `described` are `Setting`'s unit and limits."""
    metadata = {"setting": Setting(meaning, **described)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def described(field: dataclasses.Field) -> Setting:
    """The description of a field of the tree; a field that is a section has none of its own."""
    return field.metadata.get("setting", Setting(""))
