"""GPUs and what they can do: the one table that model FLOP utilisation and the planner read.

The figures are those of the makers' data sheets and whitepapers, for boards at full power: bf16 without sparsity and
with fp32 accumulation; fp32 without TF32. A board with less power, or a slice of one, reaches less: set
`logging.peak_tflops` for it. A CPU is in no data sheet; set what a large product of matrices reaches there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Board:
    """A GPU.

    Attributes:
        name: for people to ask for it.
        pattern: regular expression of the name that its driver gives.
        bf16, fp32: dense TFLOP/s.
        memory: GB (1e9 bytes). What a driver shows is up to 7% more.
        bandwidth: of its memory, GB/s.
        host_link: to host memory, GB/s and direction.
        peer_link: to the other GPUs of its machine all together, GB/s and direction, by NVLink or Infinity Fabric; 0:
            it has none. Some boards need a bridge for it, which joins two.
        source: of the figures.
    """

    name: str
    pattern: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    host_link: float
    peer_link: float
    source: str


# The first whose pattern matches counts, so special boards come first.
BOARDS: tuple[Board, ...] = (
    # an NVLink-C2C of 450 GB/s and direction joins a Grace processor to two GPUs
    Board("gb200", r"GB200", 2500.0, 80.0, 186, 8000, 225, 900, "NVIDIA GB200 NVL72 data sheet, a GPU"),
    Board("b200", r"(?<!G)B200", 2250.0, 75.0, 180, 7700, 64, 900, "NVIDIA HGX B200 data sheet, a GPU"),
    Board("h200", r"(?<!G)H200", 989.4, 66.9, 141, 4800, 64, 450, "NVIDIA H200 data sheet, SXM"),
    Board("h100-nvl", r"H100 NVL", 835.5, 60.0, 94, 3900, 64, 300, "NVIDIA H100 data sheet"),
    Board("h100-pcie", r"H100 PCIe", 756.5, 51.2, 80, 2000, 64, 300, "NVIDIA H100 data sheet"),
    Board("gh200", r"GH200", 989.4, 66.9, 96, 4000, 450, 450, "NVIDIA GH200 data sheet, HBM3"),
    Board("h100", r"H100", 989.4, 66.9, 80, 3350, 64, 450, "NVIDIA H100 data sheet, SXM"),
    Board("a100-40", r"A100.*40GB", 312.0, 19.5, 40, 1555, 32, 300, "NVIDIA A100 data sheet"),
    Board("a100-pcie", r"A100.*PCIe", 312.0, 19.5, 80, 1935, 32, 300, "NVIDIA A100 data sheet"),
    Board("a100", r"A100", 312.0, 19.5, 80, 2039, 32, 300, "NVIDIA A100 data sheet, SXM"),
    Board("a800", r"A800", 312.0, 19.5, 80, 2039, 32, 200, "NVIDIA A800 data sheet, SXM"),
    Board("a10", r"A10(?!\d)", 125.0, 31.2, 24, 600, 32, 0, "NVIDIA A10 data sheet"),
    Board("a30", r"A30(?!\d)", 165.0, 10.3, 24, 933, 32, 100, "NVIDIA A30 data sheet"),
    Board("a40", r"A40(?!\d)", 149.7, 37.4, 48, 696, 32, 56.25, "NVIDIA A40 data sheet"),
    Board("a6000", r"RTX A6000", 154.8, 38.7, 48, 768, 32, 56.25, "NVIDIA Ampere GA102 whitepaper"),
    Board("l40s", r"L40S", 362.05, 91.6, 48, 864, 32, 0, "NVIDIA L40S data sheet"),
    Board("l40", r"L40(?!S)", 181.05, 90.5, 48, 864, 32, 0, "NVIDIA L40 data sheet"),
    Board("l4", r"L4(?!\d)", 121.0, 30.3, 24, 300, 32, 0, "NVIDIA L4 data sheet"),
    Board("6000-ada", r"RTX 6000 Ada", 182.1, 91.1, 48, 960, 32, 0, "NVIDIA Ada whitepaper"),
    Board("5090", r"RTX 5090", 209.5, 104.8, 32, 1792, 64, 0, "NVIDIA RTX Blackwell whitepaper"),
    Board("4090", r"RTX 4090", 165.2, 82.6, 24, 1008, 32, 0, "NVIDIA Ada whitepaper"),
    Board("3090", r"RTX 3090", 71.0, 35.6, 24, 936, 32, 56.25, "NVIDIA Ampere GA102 whitepaper"),
    Board("mi325x", r"MI325X", 1307.4, 163.4, 256, 6000, 64, 448, "AMD Instinct MI325X data sheet"),
    Board("mi300x", r"MI300X", 1307.4, 163.4, 192, 5300, 64, 448, "AMD Instinct MI300X data sheet"),
    # 383 TFLOP/s of two dies; one device is one die
    Board("mi250x", r"MI250X", 191.5, 47.9, 64, 1638, 32, 200, "AMD Instinct MI250X data sheet, a die"),
)


def board_of(device_name: str) -> Board | None:
    """The board that a driver calls so; None if it is not in the table."""
    found = (board for board in BOARDS if re.search(rf"(?:{board.pattern})(?!\d)", device_name, re.IGNORECASE))
    return next(found, None)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOPs a second of a device by its name; None if it is not in the table."""
    board = board_of(device_name)
    return None if board is None else board.bf16 * 1e12
