"""How the log-prob kernels are cut into blocks, by GPU: fixed sizes, so that a number never depends on a timing.

Reasoned from what a block needs of shared memory and registers, and checked by compiling (tests/compile_kernels.py);
none of them was chosen by measuring.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut: BLOCK_S tokens x BLOCK_V logits, BLOCK_H products at a time, and how a block is run."""

    tokens: int
    vocabulary: int
    width: int
    warps: int
    stages: int


# By compute capability, for 16-bit operands. One stage holds (tokens + vocabulary) * width * 2 bytes of shared memory;
# the fp32 accumulator takes tokens * vocabulary / (32 * warps) of each thread's 255 registers. A block of s x v logits
# reads (s + v) / (s v) numbers per multiplication, so large blocks are what keeps matrix units fed. A few hundred bytes
# that a thread spills, once a tile, are little beside the megabytes that the tile's products read.
#   sm_80 (A100): 163 KiB a block. mma.sync keeps operands in registers too, so 128 x 256 would be at their limit.
#   sm_90 (H100, H200): 227 KiB. wgmma reads operands from shared memory; 48 KiB a stage, 4 stages 192 KiB.
#   sm_100 (B200): 227 KiB, accumulators in tensor memory until a tile is done; otherwise as sm_90.
#   others (sm_86, sm_89 and sm_120 have 99 KiB, sm_75 64): 16 KiB a stage, 3 stages at most 48 KiB.
# fp32 products don't use matrix units (they would round to tf32): small blocks, registers are what is short.
BLOCKS = {
    (8, 0): Blocks(128, 128, 64, warps=8, stages=4),
    (9, 0): Blocks(128, 256, 64, warps=8, stages=4),
    (10, 0): Blocks(128, 256, 64, warps=8, stages=4),
}
OTHER_BLOCKS = Blocks(128, 128, 32, warps=8, stages=3)
FP32_BLOCKS = Blocks(64, 64, 32, warps=4, stages=3)
# A soft-cap's slope is a second number for each logit, which 128 x 256 has no registers for.
SOFTCAP_BLOCKS = Blocks(128, 128, 64, warps=8, stages=4)
# A width that is no multiple of the block's has to be masked. Then nothing is copied to shared memory ahead of time,
# and operands and their addresses are in registers: smaller blocks, which spill none.
ODD_WIDTH_BLOCKS = Blocks(64, 128, 32, warps=8, stages=3)

# What the tile and the fp32 sums of dhidden may take together, and the least that is left for the tile. Larger tiles
# make fewer, longer products, and dhidden is read and written once per tile: at S = 8192, H = 4096 and V = 128256 the
# tile is 24576 columns wide and those sums are 3% of the product's time.
MEMORY_BYTES = 512 * 2**20
LEAST_TILE_BYTES = 64 * 2**20


def default_blocks(capability: tuple[int, int], dtype: torch.dtype, width: int, softcap: bool) -> Blocks:
    """The blocks for a device, the operands' dtype, the hidden size and whether logits are capped.

    All of this is the same for a policy and its reference, whatever is trained: log-probs that are computed in the same
    blocks are the same to the last bit.
    """
    if dtype == torch.float32:
        return FP32_BLOCKS
    blocks = BLOCKS.get(capability, OTHER_BLOCKS)
    if width % blocks.width:
        return ODD_WIDTH_BLOCKS
    return SOFTCAP_BLOCKS if softcap and blocks.vocabulary > SOFTCAP_BLOCKS.vocabulary else blocks
