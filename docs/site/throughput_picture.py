"""Draw docs/images/throughput.svg, speed beside TRL, from stored results: `python docs/site/throughput_picture.py`.

`benchmarks/throughput.py` made the results (docs/benchmarks.md has the commands). Colours follow the reader's light or
dark mode.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc"
PICTURE = ROOT / "docs" / "images" / "throughput.svg"
SETTING = "SmolLM2-135M on two CPU cores, stored reference values, TRL all in bf16 unless said otherwise"
WIDTH, LEFT, ROW, TOP = 760, 300, 30, 88
STYLE = """
    text { font: 14px system-ui, sans-serif; fill: #1f2328 }
    .quiet { fill: #59636e; font-size: 13px }
    .card { fill: #ffffff; stroke: #d1d9e0 }
    .ours { fill: #3f51b5 }
    .trl { stroke: #59636e; stroke-dasharray: 4 3 }
    @media (prefers-color-scheme: dark) {
      text { fill: #f0f6fc }
      .quiet { fill: #9198a1 }
      .card { fill: #0d1117; stroke: #3d444d }
      .ours { fill: #8c9eff }
      .trl { stroke: #9198a1 }
    }"""


def ratios() -> list[tuple[str, float]]:
    """(what, our pairs a second over TRL's), with stored reference values and rows in `shared_prefix`."""
    (real,) = _data_sets("throughput")
    ours = _speed(real, work="dpo_scale", layout="shared_prefix", compile=True, reference="store")
    bars = [
        ("real pairs, TRL with fp32 states", ours / _speed(real, work="trl", reference="store", kind="mixed")),
        ("real pairs", ours / _speed(real, work="trl", reference="store", kind="same")),
    ]
    for made in _data_sets("throughput_generated"):
        ours = _speed(made, work="dpo_scale", layout="shared_prefix", compile=False, reference="store")
        ratio = made["name"].partition("= ")[2]
        bars.append((f"made up, prompt {ratio} x completion", ours / _speed(made, work="trl", reference="store")))
    return bars


def picture(bars: list[tuple[str, float]]) -> str:
    """The bars as SVG."""
    scale = (WIDTH - LEFT - 60) / max(ratio for _, ratio in bars)
    height = TOP + ROW * len(bars) + 18
    at_one = LEFT + scale
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"  <style>{STYLE}\n  </style>",
        f'  <rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        '  <text x="20" y="30" font-weight="600">Pairs a second beside TRL 1.16</text>',
        f'  <text class="quiet" x="20" y="52">{SETTING}</text>',
        f'  <text class="quiet" x="{at_one:.0f}" y="{TOP - 8}" text-anchor="middle">TRL = 1</text>',
    ]
    for number, (name, ratio) in enumerate(bars):
        y = TOP + ROW * number
        lines += [
            f'  <text x="{LEFT - 12}" y="{y + 18}" text-anchor="end">{name}</text>',
            f'  <rect class="ours" x="{LEFT}" y="{y + 4}" width="{scale * ratio:.0f}" height="{ROW - 10}" rx="3"/>',
            f'  <text x="{LEFT + scale * ratio + 8:.0f}" y="{y + 18}" font-weight="600">{ratio:.1f}</text>',
        ]
    lines.append(f'  <line class="trl" x1="{at_one:.0f}" y1="{TOP}" x2="{at_one:.0f}" y2="{height - 16}"/>')
    return "\n".join([*lines, "</svg>", ""])


def _data_sets(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["data_sets"]


def _speed(data_set: dict, **arm: object) -> float:
    (found,) = (each for each in data_set["arms"] if all(each.get(key) == value for key, value in arm.items()))
    return found["pairs_per_second"]


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture(ratios()))
