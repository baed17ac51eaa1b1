"""Run docs/walk.md: its Python blocks from top to bottom, and compare what each prints with the block below it.

    python docs/site/walk.py            fails if a result is not what the page says
    python docs/site/walk.py --write    puts the results into the page

Numbers with a decimal point may be off by `TOLERANCE`: other processors add in another order.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "walk.md"
TOLERANCE = 0.02
_BLOCKS = re.compile(r"```python\n(?P<code>.*?)```\n\n```text\n(?P<printed>.*?)```\n", re.DOTALL)
_DECIMAL = re.compile(r"-?\d+\.\d+")


def run(page: str) -> list[str]:
    """What each Python block of the page prints, all run in one namespace."""
    namespace: dict[str, object] = {}
    printed = []
    for block in _BLOCKS.finditer(page):
        output = io.StringIO()
        line = page[: block.start("code")].count("\n")
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * line + block["code"], str(PAGE), "exec"), namespace)
        printed.append("".join(f"{text.rstrip()}\n" for text in output.getvalue().splitlines()))
    return printed


def differences(page: str, printed: list[str]) -> list[str]:
    """Lines that the page says and the code does not print, or the other way round."""
    found = []
    for block, new in zip(_BLOCKS.finditer(page), printed, strict=True):
        said, came = block["printed"].splitlines(), new.splitlines()
        if len(said) != len(came):
            found.append(f"the page says {len(said)} lines, there came {len(came)}: {came}")
            continue
        found += [f"the page says {a!r}, there came {b!r}" for a, b in zip(said, came, strict=True) if not _same(a, b)]
    return found


def write(page: str, printed: list[str]) -> str:
    """The page with these results."""
    results = iter(printed)
    return _BLOCKS.sub(lambda block: f"```python\n{block['code']}```\n\n```text\n{next(results)}```\n", page)


def _same(a: str, b: str) -> bool:
    numbers = zip(map(float, _DECIMAL.findall(a)), map(float, _DECIMAL.findall(b)), strict=False)
    return _DECIMAL.sub("#", a) == _DECIMAL.sub("#", b) and all(abs(x - y) <= TOLERANCE for x, y in numbers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help="put the results into the page")
    page = PAGE.read_text()
    if parser.parse_args().write:
        PAGE.write_text(write(page, run(page)))
        return 0
    found = differences(page, run(page))
    print("\n".join(found) or f"{PAGE.name}: every result is what the page says")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
