"""A user's mistake that rank 1 alone meets, while rank 0 waits for it in a collective."""

import torch

from dpo_scale.distributed import ranks
from dpo_scale.distributed.join import join
from dpo_scale.errors import DataError
from dpo_scale.run.cli import run


def main() -> None:
    join(timeout_minutes=2)
    if ranks.rank() == 1:
        raise DataError("pairs.jsonl row 3: seen by rank 1 alone")
    ranks.sum_over_ranks(torch.ones(1))


if __name__ == "__main__":
    run(main)
