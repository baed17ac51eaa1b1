"""The most FLOPs a second that a device can do, for model FLOP utilisation.

Dense bf16 (without sparsity) with fp32 accumulation, as the makers' data sheets state it for boards at full power. A
board with less power, or a slice of one, reaches less: set `logging.peak_tflops` for it. A CPU has no such figure; set
what a large product of matrices reaches there.
"""

from __future__ import annotations

import re

# Regular expression of a device's name -> TFLOP/s. The first that matches counts, so special boards come first.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"GB200", 2500.0),  # NVIDIA GB200 NVL72 data sheet, a GPU
    (r"B200", 2250.0),  # NVIDIA HGX B200 data sheet, a GPU
    (r"H200", 989.4),  # NVIDIA H200 data sheet, SXM
    (r"H100 NVL", 835.5),  # NVIDIA H100 data sheet
    (r"H100 PCIe", 756.5),  # NVIDIA H100 data sheet
    (r"H100|GH200", 989.4),  # NVIDIA H100 data sheet, SXM
    (r"A100|A800", 312.0),  # NVIDIA A100 data sheet
    (r"A10(?!\d)", 125.0),  # NVIDIA A10 data sheet
    (r"A30(?!\d)", 165.0),  # NVIDIA A30 data sheet
    (r"A40(?!\d)", 149.7),  # NVIDIA A40 data sheet
    (r"RTX A6000", 154.8),  # NVIDIA Ampere GA102 whitepaper
    (r"L40S", 362.05),  # NVIDIA L40S data sheet
    (r"L40(?!S)", 181.05),  # NVIDIA L40 data sheet
    (r"L4(?!\d)", 121.0),  # NVIDIA L4 data sheet
    (r"RTX 6000 Ada", 182.1),  # fp32 accumulation; NVIDIA Ada whitepaper
    (r"RTX 5090", 209.5),  # fp32 accumulation; NVIDIA RTX Blackwell whitepaper
    (r"RTX 4090", 165.2),  # fp32 accumulation; NVIDIA Ada whitepaper
    (r"RTX 3090", 71.0),  # fp32 accumulation; NVIDIA Ampere GA102 whitepaper
    (r"MI325X|MI300X", 1307.4),  # AMD Instinct MI300X and MI325X data sheets
    (r"MI250X", 191.5),  # AMD Instinct MI250X data sheet says 383 of both dies; one device is one die
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOPs a second of a device by its name; None if it is not in the table."""
    found = (tflops * 1e12 for pattern, tflops in PEAK_TFLOPS if re.search(pattern, device_name, re.IGNORECASE))
    return next(found, None)
