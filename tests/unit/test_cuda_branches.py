"""What is written for CUDA alone, on an emulated device that fails on the misuse that CUDA fails on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulated_cuda import EmulatedCuda, MisuseError

from dpo_scale.data.batching import MicroBatch
from dpo_scale.data.dataset import Pair
from dpo_scale.distributed import engine, ranks
from dpo_scale.models.activations import offloaded_checkpoint
from dpo_scale.observe.metrics import MetricSums
from dpo_scale.observe.timing import StepTimer
from dpo_scale.reference.protocol import NoReference
from dpo_scale.training.plan import load_batch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="emulates a device where there is none")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(ranks, "device", lambda: CUDA)
    with EmulatedCuda() as device:
        yield device


def what(cuda):
    return [wait.what for wait in cuda.waits]


def timed_step(timer, sums=None):
    timer.start()
    for phase in ("data", "forward", "backward", "optimizer"):
        with timer.phase(phase):
            values = torch.ones(5, device="cuda") * 2
    if sums is not None:
        sums.add({"loss": values}, torch.ones(5, device="cuda"))


# ---- the timer ----------------------------------------------------------------------------------------------


def test_the_timer_reads_events_once_the_last_is_complete(cuda):
    timer = StepTimer(CUDA, 2)
    for _ in range(3):
        timed_step(timer)
        shares = timer.shares()
        assert shares["time/forward"] > 0 and shares["time/optimizer"] > 0 and shares["time/reference"] == 0
    assert what(cuda) == ["event.synchronize"] * 3


def test_after_the_metrics_are_read_the_timer_waits_for_nothing(cuda):
    timer, sums = StepTimer(CUDA, 2), MetricSums()
    timed_step(timer, sums)
    norm = torch.full((), 3.0, device="cuda")
    means, per_rank, others = sums.reduce(7.0, 0.5, True).read(norm)
    timer.shares()
    assert what(cuda) == ["tolist"]
    assert means == {"loss": 2.0} and others == [3.0]
    np.testing.assert_array_equal(per_rank, [[7.0], [0.5], [1.0]])


def test_a_norm_on_the_host_is_not_taken_to_the_device_and_back(cuda):
    sums = MetricSums()
    timed_step(StepTimer(CUDA, 2), sums)
    _, _, others = sums.reduce().read(torch.tensor(4.0), torch.full((), 5.0, device="cuda"), torch.tensor(6.0))
    assert others == [4.0, 5.0, 6.0] and what(cuda) == ["tolist"]


# ---- batches ------------------------------------------------------------------------------------------------


def make_loaded_batch():
    pairs = [Pair(np.arange(5), np.arange(4), np.arange(3), b"", i) for i in range(2)]
    micro_batch = MicroBatch(np.array([0, 1]), np.ones(2, dtype=np.float32))
    return load_batch(pairs, micro_batch, 0, NoReference(), "shared_prefix")


def tensors_of(batch):
    return [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]


def test_batches_are_made_in_page_locked_memory_and_copied_without_a_wait(cuda):
    batch = make_loaded_batch()
    assert len(tensors_of(batch)) == 10 and all(tensor.is_pinned() for tensor in tensors_of(batch))
    there = batch.to(CUDA)
    assert all(tensor.is_cuda for tensor in tensors_of(there)) and there.scored_tokens == (7, 7)
    assert cuda.waits == []
    assert there.input_ids.tolist() == batch.input_ids.tolist()


def test_a_batch_that_is_overwritten_while_it_is_copied_is_found(cuda):
    batch = make_loaded_batch()
    there = batch.to(CUDA)
    with pytest.raises(MisuseError, match="still being copied from"):
        batch.input_ids.zero_()
    there.input_ids.sum().item()
    batch.input_ids.zero_()


# ---- activations on the host --------------------------------------------------------------------------------


def layer(hidden, scale):
    return (hidden * scale).sin().exp()


def test_activations_go_to_page_locked_memory_and_come_back_without_a_wait(cuda):
    leaf = torch.linspace(-1, 1, 24, device="cuda").view(4, 6).requires_grad_()
    scale = torch.linspace(0.5, 2, 6, device="cuda")
    out = offloaded_checkpoint(layer, leaf * 1.0, scale)
    out = offloaded_checkpoint(layer, out, scale)
    out.sum().backward()
    assert cuda.waits == [] and cuda.races == []
    again = leaf.detach().requires_grad_()
    layer(layer(again * 1.0, scale), scale).sum().backward()
    assert torch.equal(leaf.grad, again.grad)


def test_a_copy_back_on_another_stream_is_found(cuda):
    tensor = torch.ones(4, device="cuda")
    kept = torch.empty(4, pin_memory=True).copy_(tensor, non_blocking=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        kept.to("cuda", non_blocking=True)
    assert len(cuda.races) == 1
    with pytest.raises(MisuseError, match="copy to the host"):
        kept.tolist()
    torch.cuda.synchronize()
    assert kept.tolist() == [1.0] * 4


# ---- the emulation itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda t: t.sum().item(), "item"),
        (lambda t: bool(t.any()), "item"),
        (lambda t: t.tolist(), "tolist"),
        (lambda t: t.cpu(), "a copy to pageable memory"),
        (lambda t: t.nonzero(), "nonzero"),
        (lambda t: t[t > 0], "a mask as index"),
        (lambda t: torch.bincount(t), "bincount"),
        (lambda t: t.repeat_interleave(t), "repeat_interleave"),
        (lambda t: torch.equal(t, t), "equal"),
        (lambda t: torch.tensor([1, 2], device="cuda"), "tensor(..., device=...)"),
        (lambda t: torch.ones(4).to("cuda", non_blocking=True), "a copy from pageable memory"),
        (lambda t: torch.ones(4).pin_memory().to("cuda"), "a blocking copy"),
        (lambda t: torch.cuda.current_stream().synchronize(), "stream.synchronize"),
        (lambda t: torch.cuda.synchronize(), "synchronize"),
    ],
)
def test_each_kind_of_wait_is_seen(cuda, call, expected):
    tensor = torch.arange(4, device="cuda") * 2
    call(tensor)
    assert what(cuda) == [expected]
    assert cuda.waits[0].where.startswith("tests/unit/test_cuda_branches.py")


def test_what_needs_no_wait_is_none(cuda):
    tensor, index = torch.arange(4.0, device="cuda"), torch.arange(4, device="cuda")
    tensor[1:] = 3.0
    tensor[tensor > 2] = 0.0
    tensor.masked_fill_(tensor > 1, 2.0).index_select(0, index)
    index.repeat_interleave(index, output_size=6)
    torch.where(tensor > 0, tensor, 0.0).sum()
    assert tensor.to(CUDA) is tensor and tensor.device == CUDA and torch.zeros(2).device.type == "cpu"
    assert cuda.waits == []


def test_an_event_that_is_not_complete_is_not_read(cuda):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    end.record()
    with pytest.raises(MisuseError, match="complete"):
        begin.elapsed_time(end)
    begin.synchronize()
    with pytest.raises(MisuseError, match="complete"):
        begin.elapsed_time(end)
    end.synchronize()
    assert begin.elapsed_time(end) >= 0


def test_host_and_device_are_not_mixed(cuda):
    with pytest.raises(MisuseError, match="add of host and device tensors"):
        torch.ones(4, device="cuda") + torch.ones(4)


def test_streams_wait_for_each_other_or_race(cuda):
    tensor, side = torch.ones(4, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tensor.mul_(2)
    assert cuda.races == []
    tensor.sum()
    assert len(cuda.races) == 1
    torch.cuda.current_stream().wait_event(side.record_event())
    tensor.sum()
    assert len(cuda.races) == 1


# ---- the launcher -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, told",
    [({}, True), ({"OMP_NUM_THREADS": "4"}, False), ({"TORCHELASTIC_RUN_ID": None}, False)],
)
def test_an_offloaded_optimizer_that_torchrun_leaves_one_thread_is_told_of(monkeypatch, changes, told):
    said = []
    monkeypatch.setattr(ranks, "log", said.append)
    monkeypatch.setattr(ranks, "device", lambda: CUDA)
    monkeypatch.setattr(engine.os, "sched_getaffinity", lambda _: range(16), raising=False)
    start = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (start | changes).items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    engine.say_if_one_thread_is_left()
    assert [("torchrun" in line, "set it to 8" in line) for line in said] == [(True, True)] * told
