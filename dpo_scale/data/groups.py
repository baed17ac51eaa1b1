"""Which ranks may share a row: groups of neighbours, each of which computes every N-th part of the row's tokens.

A group of N ranks is made of the ranks that have the same `rank // N`. So groups of sizes that divide each other never
overlap in part, and a micro-step can hold groups of several sizes side by side. How a row is shared is the subject of
`dpo_scale.distributed.sequence_parallel`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Groups:
    """What the planning of batches has to know of the ranks.

    Attributes:
        world_size: number of ranks.
        sizes: a group may have, ascending. Each divides the next, and the last divides `world_size`. One size: all
            groups have it.
    """

    world_size: int
    sizes: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        chain = (*self.sizes, self.world_size)
        assert all(a <= b and b % a == 0 for a, b in zip(chain, chain[1:], strict=False)), chain

    @property
    def largest(self) -> int:
        return self.sizes[-1]

    def smallest_for(self, tokens: np.ndarray, max_tokens: int) -> np.ndarray:
        """Ranks of the smallest group in which none holds more than `max_tokens`; the largest, where none does.

        int64 [n], for rows of so many tokens [n].
        """
        sizes = np.array(self.sizes)
        return sizes[np.searchsorted(sizes * max_tokens, tokens).clip(max=len(sizes) - 1)]
