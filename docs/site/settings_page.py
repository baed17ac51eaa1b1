"""Writes docs/settings.md from the descriptions beside the settings' fields: `python docs/site/settings_page.py`."""

from __future__ import annotations

from pathlib import Path

from dpo_scale.settings.data import SourceSettings
from dpo_scale.settings.reader import Option, list_options, list_sections
from dpo_scale.settings.tree import Config

PAGE = Path(__file__).resolve().parents[1] / "settings.md"
INTRODUCTION = """\
# Settings

Every option of a config file, by section. On the command line an option is written `section.key=value`; its value is
YAML. An unknown key, a wrong type or an impossible value is refused in one line before anything is loaded.

`launch/train.py --help` prints the same options. `--print-config` prints what a file and its overrides come to.

<!-- Written by docs/site/settings_page.py out of the code. Change what stands beside the field, then run it. -->
"""


def page() -> str:
    """The whole page as Markdown."""
    lines = [INTRODUCTION]
    for name, summary, options in list_sections(Config):
        lines += [f"## {name}", "", summary] if name else ["## At the top level"]
        lines += ["", *_table(options), ""]
        if name == "data":
            lines += ["### A source of data", "", "What an entry of `data.train` and `data.eval` may hold.", ""]
            lines += [*_table(list_options(SourceSettings)), ""]
    return "\n".join(lines)


def _table(options: list[Option]) -> list[str]:
    rows = ["| option | value | default | meaning |", "|---|---|---|---|"]
    for key, expected, default, meaning in options:
        cells = (f"`{key}`", expected, f"`{default}`", meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
