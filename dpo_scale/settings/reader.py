"""Mappings into dataclasses, strictly: every key known, every value of its declared type and in its range.

Only the types that the settings use are understood: bool, int, float, str, Literal, list, dict, dataclasses and
unions of these. A dataclass with a `parse` classmethod takes shorthand forms (a plain string for a data source).
YAML 1.1 reads `5e-6` as a string, so a float field takes strings that are numbers.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import yaml

from dpo_scale.errors import ConfigError
from dpo_scale.settings.fields import Setting, described

KEY_ALIASES = {
    "model.model_name_or_path": "model.path",
    "model.torch_dtype": "model.dtype",
    "train.use_liger_kernel": "model.liger",
    "train.mixed_precision_reduce": "train.reduce_dtype",
}


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML would silently resolve to the last one."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError names file and line if it can't be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        mapping = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: expected sections (model:, data:, ...), found {_describe(mapping)}")
    return mapping


def apply_override(mapping: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in a nested mapping; the value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {override!r}: expected section.key=value, e.g. train.learning_rate=5e-7")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text  # paths and templates may hold characters that YAML reads otherwise
    set_nested(mapping, key.strip().split("."), value)


def set_nested(mapping: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a value in nested mappings, which are made where there is none."""
    for name in path[:-1]:
        if not isinstance(mapping.get(name), dict):
            mapping[name] = {}
        mapping = mapping[name]
    mapping[path[-1]] = value


def build(cls: type, value: Any, key: str = "", root: type | None = None) -> Any:
    """An instance of the dataclass `cls` from a mapping; ConfigError names the dotted key of what is wrong."""
    root = root or cls
    if hasattr(cls, "parse") and not isinstance(value, dict):
        value = cls.parse(value)
        if isinstance(value, cls):
            return value
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key} = {value!r}: expected a section with keys, found {_describe(value)}")
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in value:
        if name not in known:
            raise ConfigError(_unknown_key(_join(key, name), root))
    return cls(**{n: _read(hints[n], item, _join(key, n), root, described(known[n])) for n, item in value.items()})


def to_mapping(value: Any) -> Any:
    """The inverse of `build`: dataclasses to nested plain mappings."""
    return dataclasses.asdict(value)


class Option(NamedTuple):
    """One line of `--help` and of the settings page; all text, the default as a config file writes it."""

    key: str
    expected: str
    default: str
    meaning: str


def list_sections(root: type) -> Iterator[tuple[str, str, list[Option]]]:
    """(name, what it is about, its options) of every section, then of the top level under the name ""."""
    hints = typing.get_type_hints(root)
    for field in dataclasses.fields(root):
        section = hints[field.name]
        if _is_section(section):
            summary = " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split())
            yield field.name, summary, list_options(section, field.name)
    yield "", "At the top level.", list_options(root)


def list_options(cls: type, section: str = "") -> list[Option]:
    """The options of one section, in the order of its class."""
    hints, options = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        if not _is_section(hints[field.name]):
            value = getattr(cls(), field.name)
            default = json.dumps(value).replace('"', "") or '""'
            about = described(field)
            expected = about.expected(describe_type(hints[field.name]))
            options.append(Option(_join(section, field.name), expected, default, about.meaning))
    return options


def list_keys(root: type) -> list[str]:
    """The dotted key of every option."""
    return [option.key for _, _, options in list_sections(root) for option in options]


def _is_section(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def describe_type(hint: Any) -> str:
    """A type as a user would name it: `a number`, `one of 'a', 'b'`, `null or text`, `a list of texts`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(repr(item) for item in arguments)
    if origin in (typing.Union, types.UnionType):
        ordered = sorted(arguments, key=lambda item: item is not type(None))
        *words, last = (describe_type(item) for item in ordered)
        return f"{', '.join(words)} or {last}"
    if origin is list:
        return f"a list of {describe_type(arguments[0]).removeprefix('a ')}s"
    if origin is dict or hint is dict:
        return "a mapping"
    if _is_section(hint):
        return hint.__name__.removesuffix("Settings").lower()
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return names.get(hint, "any value")


def _read(hint: Any, value: Any, key: str, root: type, about: Setting) -> Any:
    """A field's value, of its type and in its range."""
    converted = _try_convert(hint, value, key, root)
    if converted is not _MISMATCH and about.allows(converted):
        return converted
    message = f"{key} = {value!r}: expected {about.expected(describe_type(hint))}"
    if converted is not _MISMATCH:
        raise ConfigError(f"{message} ({about.meaning})")
    message += f", found {_describe(value)}"
    if typing.get_origin(hint) is typing.Literal and isinstance(value, str):
        nearest = difflib.get_close_matches(value, [str(item) for item in typing.get_args(hint)], n=1)
        message += f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ConfigError(message)


_MISMATCH = object()


def _try_convert(hint: Any, value: Any, key: str, root: type) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Literal:
        if value is False and "off" in arguments:
            return "off"  # as YAML reads the bare word
        # bool is an int to Python: `stage: true` must not become stage 1
        matches = [item for item in arguments if item == value and type(item) is type(value)]
        return matches[0] if matches else _MISMATCH
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        results = (_try_convert(item, value, key, root) for item in arguments)
        return next((result for result in results if result is not _MISMATCH), _MISMATCH)
    if origin is list:
        # one source or metric needs no brackets; null is the empty list
        items = [] if value is None else value if isinstance(value, list) else [value]
        return [_read(arguments[0], item, f"{key}[{i}]", root, Setting("")) for i, item in enumerate(items)]
    if origin is dict or hint is dict:
        return {} if value is None else dict(value) if isinstance(value, dict) else _MISMATCH
    if _is_section(hint):
        return build(hint, value, key, root)
    if hint is float:
        return _to_float(value)
    if hint in (bool, int, str, type(None)):  # by type, not isinstance: true is an int to Python
        return value if type(value) is hint else _MISMATCH
    raise AssertionError(f"{key}: settings use a type that the reader does not know: {hint!r}")


def _to_float(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _MISMATCH
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return _MISMATCH
    return number if math.isfinite(number) else _MISMATCH


def _unknown_key(key: str, root: type) -> str:
    known = list_keys(root)
    sections = [field.name for field in dataclasses.fields(root)]
    if key in KEY_ALIASES:
        return f"unknown key {key}: did you mean {KEY_ALIASES[key]}?"
    # the right name in the wrong section is the commonest mistake; then a misspelt one
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    leaves = {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(key, known + sections, n=1, cutoff=0.75) or [
        leaves[name] for name in difflib.get_close_matches(leaf, list(leaves), n=1)
    ]
    nearest = same_leaf or near
    hint = f"did you mean {nearest[0]}?" if nearest else f"the sections are {', '.join(sections)}"
    return f"unknown key {key}; {hint}"


def _join(prefix: str, name: object) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


def _describe(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    names = {bool: "true/false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    return "a mapping" if isinstance(value, dict) else names.get(type(value), type(value).__name__)
