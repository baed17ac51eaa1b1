"""Devices and machines by name: `--device h100 --gpus 4x8 --interconnect nvlink+ib400`.

What a board can do comes from data sheets (`dpo_scale.observe.devices`). What of it a training step reaches is assumed
here, until it is measured on the device itself (`dpo_scale.forecast.calibrate`). Every assumption stands in this file
with its reason.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import replace

from dpo_scale.errors import ConfigError
from dpo_scale.forecast.parts import Cluster, Device
from dpo_scale.observe.devices import BOARDS, Board, board_of

# Assumed share of the bf16 peak that the products of a training step reach, kernels' tails and elementwise work
# included, communication not. The first pattern of a board's name that matches counts.
_EFFICIENCY: tuple[tuple[str, float, str], ...] = (
    ("gb200|b200|5090", 0.40, "a guess below Hopper's: power limits the peak further"),
    ("h100|h200|gh200", 0.45, "38 to 43% with communication in Llama 3's report (arXiv 2407.21783, table 4)"),
    ("mi", 0.35, "a guess: products of AMD's libraries reach less of their peak than NVIDIA's"),
    ("", 0.50, "44 to 52% with communication on A100s in Megatron-LM's paper (arXiv 2104.04473, table 1)"),
)
# Assumed share of a link's stated rate that large transfers reach: NCCL's tests show 85 of 100 GB/s over InfiniBand and
# about 370 of 450 over NVLink; pinned copies over PCIe 4.0 reach about 25 of 32.
LINK_EFFICIENCY = 0.8
# Assumed to be held by the driver, cuBLAS and NCCL's communicators, whose buffers grow with their number: 1.5 to 3 GB.
CONTEXT = 2_000_000_000
# Assumed of a processor that was not measured, a core: an AVX2 core at 3 GHz, and its share of two memory channels.
_CPU_FLOPS, _CPU_BANDWIDTH = 50e9, 8e9
CPU_CONTEXT = 600_000_000  # resident after the imports of torch, transformers and DeepSpeed

# Seconds of a ring's steps, from NCCL's own model of itself (its src/graph/tuning.cc, protocol Simple).
_RING_BASE, _STEP_BY_PEER_LINK, _STEP_BY_PCIE, _STEP_BETWEEN = 8.4e-6, 3.4e-6, 5.7e-6, 14.0e-6

_BETWEEN = {"ib": "InfiniBand", "roce": "RoCE", "efa": "EFA", "eth": "Ethernet"}
_INTERCONNECTS = (
    "say nvlink or pcie, and between machines + ib400, roce400 or efa400 (Gbit/s of each GPU's own adapter) or eth100 "
    "(Gbit/s of the machine, shared by its GPUs), e.g. nvlink+ib400"
)


def cluster_of(gpus: str, device: str, interconnect: str | None, dtype: str) -> Cluster:
    """The cluster that the command line names.

    Args:
        gpus, device, interconnect: as `parse_gpus`, `find_device` and `parse_interconnect` take them; without an
            interconnect the GPUs' own links and InfiniBand of 400 Gbit/s a GPU, or PCIe and 100 Gbit/s Ethernet where
            they have none.
        dtype: of the model's weights, "float32", "bfloat16" or "float16".

    Raises:
        ConfigError: if one of them is unknown.
    """
    nodes, per_node = parse_gpus(gpus)
    found = find_device(device, dtype)
    if found.name == "cpu":  # the ranks share what the machine has
        share = {name: getattr(found, name) / per_node for name in ("flops", "bandwidth", "host_link")}
        found = replace(found, memory=found.memory // per_node, **share)
    if interconnect is None:
        interconnect = "nvlink+ib400" if _peer_link(found.name) else "pcie+eth100"
    if nodes > 1 and "+" not in interconnect:
        raise ConfigError(f"--interconnect {interconnect!r}: {nodes} machines need a network too; {_INTERCONNECTS}")
    within, between = parse_interconnect(interconnect, found, per_node)
    by_peer_link = not interconnect.lower().startswith("pcie")
    latency = ring_latency(nodes, per_node, by_peer_link=by_peer_link)
    return Cluster(found, per_node, nodes, within, between, latency)


def find_device(name: str, dtype: str) -> Device:
    """A device by its short name ("h100", "a100-40"), or by its driver's ("NVIDIA H100 80GB HBM3"); or "cpu".

    Raises:
        ConfigError: if it is unknown; it names those that are near, or all.
    """
    if name.strip().lower() == "cpu":
        return _processor()
    board = _board(name)
    efficiency, reason = next((e, why) for pattern, e, why in _EFFICIENCY if re.match(pattern, board.name))
    return Device(
        name=board.name,
        memory=int(board.memory * 1e9),
        flops=(board.fp32 if dtype == "float32" else board.bf16) * 1e12,
        efficiency=efficiency,
        bandwidth=board.bandwidth * 1e9,
        host_link=LINK_EFFICIENCY * board.host_link * 1e9,
        context=CONTEXT,
        source=f"{board.source}; assumed until measured: {efficiency:.0%} of the peak ({reason}), "
        f"{LINK_EFFICIENCY:.0%} of each link, {CONTEXT / 1e9:g} GB for driver and libraries",
    )


def parse_gpus(text: str) -> tuple[int, int]:
    """Machines and GPUs of each, from "8" (one machine) or "4x8" (4 machines of 8).

    Raises:
        ConfigError: for anything else, zero included.
    """
    found = re.fullmatch(r"(?:(\d{1,6})\s*[xX*])?\s*(\d{1,6})", str(text).strip())
    nodes, per_node = (int(found[1] or 1), int(found[2])) if found else (0, 0)
    if nodes < 1 or per_node < 1:
        raise ConfigError(
            f"--gpus {text!r}: expected a number of GPUs of one machine, as 8, or machines x GPUs, as 4x8"
        )
    return nodes, per_node


def parse_interconnect(text: str, device: Device, per_node: int) -> tuple[float, float]:
    """Bytes a second that a device sends within its machine, and to other machines, each in one direction.

    "nvlink" stands for a board's own links, Infinity Fabric too. A GPU has its own adapter of InfiniBand, RoCE or EFA;
    "eth100" is what the machine has, for all its GPUs. `LINK_EFFICIENCY` of the stated rates is taken.

    Raises:
        ConfigError: if a name is unknown or the device has no such link.
    """
    within_name, _, between_name = (part.strip() for part in text.strip().lower().partition("+"))
    if within_name in ("nvlink", "xgmi"):
        within = _peer_link(device.name) * LINK_EFFICIENCY
        if not within:
            raise ConfigError(f"--interconnect {text!r}: {device.name} has no NVLink; say pcie")
    elif within_name == "pcie":
        within = device.host_link
    else:
        raise ConfigError(f"--interconnect {text!r}: unknown link {within_name!r}; {_INTERCONNECTS}")
    if not between_name:  # of one machine
        return within, within
    found = re.fullmatch(rf"({'|'.join(_BETWEEN)})(\d{{1,5}})", between_name)
    if not found or int(found[2]) == 0:
        raise ConfigError(f"--interconnect {text!r}: unknown network {between_name!r}; {_INTERCONNECTS}")
    between = int(found[2]) / 8 * 1e9 * LINK_EFFICIENCY
    return within, between / per_node if found[1] == "eth" else between


def ring_latency(nodes: int, per_node: int, *, by_peer_link: bool = True) -> float:
    """Seconds of a ring over all ranks beside the time for its bytes: one step to each next rank.

    base + (W - nodes) steps within machines + (nodes - 1) between them, as NCCL counts for its all-gathers and
    reduce-scatters. Above some hundred GPUs this is what a gather takes longest for. NCCL may choose better: trees for
    all-reduces, PAT where each machine has one rank.
    """
    step = _STEP_BY_PEER_LINK if by_peer_link else _STEP_BY_PCIE
    return _RING_BASE + nodes * (per_node - 1) * step + (nodes - 1) * _STEP_BETWEEN


def _board(name: str) -> Board:
    wanted = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    wanted = re.sub(r"^(nvidia|amd|geforce|rtx|instinct)-", "", re.sub(r"^(nvidia|amd)-", "", wanted))
    wanted = re.sub(r"-?(80|40)-?gb?$", r"-\1", wanted).replace("-sxm", "")
    wanted = re.sub(r"^(a100|h100)-80$", r"\1", wanted)
    board = next((board for board in BOARDS if board.name == wanted), None) or board_of(name)
    if board is None:
        names = [board.name for board in BOARDS]
        near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)} and cpu"
        raise ConfigError(f"--device {name!r}: not in the table of devices; {hint}")
    return board


def _peer_link(name: str) -> float:
    return next((board.peer_link * 1e9 for board in BOARDS if board.name == name), 0.0)


def host_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor() -> Device:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Device(
        name="cpu",
        memory=host_memory(),
        flops=cores * _CPU_FLOPS,
        efficiency=0.5,
        bandwidth=cores * _CPU_BANDWIDTH,
        host_link=cores * _CPU_BANDWIDTH,
        context=CPU_CONTEXT,
        source=f"assumed of {cores} cores; --calibrate measures them",
    )
