"""A live reference that moves towards the policy as training goes on (TR-DPO, arXiv 2404.09656).

Every so many steps  reference <- a * policy + (1 - a) * reference,  a = 1 replacing it. Each rank mixes one slice of
each parameter: at stage 3 the shard it holds anyway, otherwise its share of the whole. So no stage of either model
needs more than the parameter in hand to be sent, and both at stage 3 need nothing to be sent.

A mixed reference is kept in fp32, one slice a rank, and the model's own weights are roundings of it: in bf16 a small
step of a weight would be lost in the rounding, every time, and the reference would stand still.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dpo_scale.distributed import engine, ranks
from dpo_scale.errors import ModelError
from dpo_scale.models.scorer import Policy, Scorer
from dpo_scale.progress import noting_activity
from dpo_scale.reference.live import LiveReference


class MovingReference(LiveReference):
    """A live reference, and what moves it."""

    def __init__(
        self, reference: Scorer, policy: Policy, *, mixup: float, sync_steps: int, ld_alpha: float | None = None
    ) -> None:
        """Check that the models fit each other. Takes memory only where a mix has to be kept in fp32.

        Args:
            reference, policy: engines, at any stage each, before training or resuming.
            mixup: a, the policy's share, above 0 and at most 1.
            sync_steps: optimizer steps from one move to the next.
            ld_alpha: as of `LiveReference`.

        Raises:
            ModelError: if the reference is of another architecture than the policy.
        """
        super().__init__(reference, ld_alpha)
        self.policy, self.mixup, self.sync_steps = policy, mixup, sync_steps
        ours, theirs = (_shapes(model) for model in (policy, reference))
        if ours != theirs:
            name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
            raise ModelError(
                f"reference.sync_steps: the reference can move only towards a policy of its own architecture; {name} "
                f"is {theirs.get(name, 'missing')} in it and {ours.get(name, 'missing')} in the policy"
            )
        # a copy is exact, and so is a mix where the weights are fp32 themselves
        keep_fp32 = mixup < 1 and any(p.dtype != torch.float32 for p in reference.module.parameters())
        self._kept = {
            name: engine.own_slice(parameter).float() if keep_fp32 else None
            for name, parameter in reference.module.named_parameters()
        }

    def after_step(self, step: int) -> None:
        super().after_step(step)
        if step % self.sync_steps == 0:
            self.move()

    @torch.no_grad()
    def move(self) -> None:
        """One update of the reference. Every rank must call it, after the policy's optimizer step."""
        engine.write_slices(self.scorer, self._moved_slices())

    def _moved_slices(self) -> Iterator[tuple[str, Tensor]]:
        policy = dict(self.policy.module.named_parameters())
        for name, parameter in self.scorer.module.named_parameters():
            towards = engine.own_slice(policy[name])
            if self.mixup == 1:
                yield name, towards
                continue
            kept = self._kept[name]
            if kept is None:
                kept = engine.own_slice(parameter).clone()
            yield name, kept.lerp_(towards.to(kept.device, torch.float32), self.mixup)

    def state(self) -> dict[str, Tensor]:
        """This rank's slices of the reference, on the host, for a checkpoint."""
        slices = {}
        for name, parameter in noting_activity(self.scorer.module.named_parameters()):
            kept = self._kept[name]
            slices[name] = (engine.own_slice(parameter) if kept is None else kept).cpu().clone()
        return slices

    @torch.no_grad()
    def load_state(self, states: Iterable[dict[str, Tensor]]) -> None:
        """Take the slices of all ranks, as many as there were, saved at any stage. Every rank must call it.

        Raises:
            KeyError, RuntimeError: if they are of another model.
        """
        engine.write_slices(self.scorer, self._restored_slices(list(states)))

    def _restored_slices(self, states: Sequence[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in noting_activity(self.scorer.module.named_parameters()):
            if len(states) == ranks.world_size():
                slice_ = states[ranks.rank()][name]
            else:
                whole = torch.cat([state[name] for state in states])
                size = -(-len(whole) // ranks.world_size())
                slice_ = whole[ranks.rank() * size : (ranks.rank() + 1) * size]
            expected = len(engine.own_slice(parameter))
            if len(slice_) != expected:
                raise RuntimeError(f"{name}: {len(slice_)} weights of the reference, expected {expected}")
            kept = self._kept[name]
            yield name, slice_ if kept is None else kept.copy_(slice_)


def _shapes(model: Scorer) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.module.named_parameters()}
