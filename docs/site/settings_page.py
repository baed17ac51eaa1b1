"""Writes docs/settings.md from the settings' dataclasses: `python docs/site/settings_page.py`.

An option's meaning is what stands beside it in the source: the comment at the end of its line, or on the lines above
it, or its line in the class's docstring (`name: meaning`). Type and default are the dataclass's own.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import typing
from pathlib import Path

from dpo_scale.settings.data import SourceSettings
from dpo_scale.settings.reader import describe_type
from dpo_scale.settings.tree import Config

PAGE = Path(__file__).resolve().parents[1] / "settings.md"
INTRODUCTION = """\
# Settings

Every option of a config file, by section. On the command line an option is written `section.key=value`; its value is
YAML. An unknown key, a wrong type or an impossible value is refused in one line before anything is loaded.

`launch/train.py --help` prints the same options. `--print-config` prints what a file and its overrides come to.

<!-- Written by docs/site/settings_page.py out of the code. Change the comment beside the field, then run it. -->
"""


def meanings(cls: type) -> dict[str, str]:
    """{field: meaning} of a dataclass, in its order; "" where the source says nothing."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ").rstrip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    documented = _documented(ast.get_docstring(definition) or "")
    found = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            above = node.lineno - 1
            while above in alone:
                above -= 1
            lines = [comments[line] for line in range(above + 1, node.lineno)]
            lines += [comments[line] for line in range(node.lineno, node.end_lineno + 1) if line in comments]
            found[name] = " ".join(lines) or documented.get(name, "")
    return found


def _documented(docstring: str) -> dict[str, str]:
    """The lines `name: meaning` or `name, name: meaning` of a docstring, with what is indented below them."""
    found = {}
    for names, meaning in re.findall(r"^(\w+(?:, \w+)*): (.+(?:\n +.+)*)", docstring, re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(meaning.split()).rstrip("."))
    return found


def _rows(cls: type, prefix: str) -> list[str]:
    hints, meaning = typing.get_type_hints(cls), meanings(cls)
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        has_factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default
        kind = re.sub(r"mapping with .*?\)", "sources)", describe_type(hints[field.name]))
        cells = [f"`{prefix}{field.name}`", kind, f"`{_yaml(default)}`", meaning[field.name]]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _yaml(value: object) -> str:
    """A default as it would be written in a config file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else '""'


def page() -> str:
    """The whole page as Markdown."""
    lines = [INTRODUCTION]
    for name, cls in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(cls):
            summary = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
            lines += [f"## {name}", "", summary, "", *_rows(cls, f"{name}."), ""]
            if name == "data":
                lines += ["### A source of data", "", "What an entry of `data.train` and `data.eval` may hold.", ""]
                lines += [*_rows(SourceSettings, ""), ""]
    lines += ["## At the top level", "", *_rows(Config, "")]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
