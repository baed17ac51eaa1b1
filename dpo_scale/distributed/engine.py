"""DeepSpeed: an engine that trains the policy and one that only runs the reference.

Backward passes are driven with explicit accumulation boundaries and unscaled losses, because an optimizer step here may
take any number of micro-steps and weighs pairs, not micro-batches (`loss_scale_for_mean`).
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import torch

from dpo_scale.distributed import ranks
from dpo_scale.errors import ConfigError
from dpo_scale.settings.deepspeed import with_fitting_buckets

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def check_dtype(dtype: str) -> None:
    """Refuse a precision that DeepSpeed does not run on this device.

    Raises:
        ConfigError: naming the device and what it does run.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported = {
        "float32": True,
        "bfloat16": accelerator.is_bf16_supported(),
        "float16": accelerator.is_fp16_supported(),
    }
    if not supported[dtype]:
        usable = ", ".join(name for name, usable in supported.items() if usable)
        raise ConfigError(f"model.dtype = {dtype!r}: DeepSpeed runs {usable} on a {accelerator.device_name()} device")


@contextmanager
def partitioned_loading(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Within it, Hugging Face models load straight into ZeRO-3 shards if the config says stage 3.

    transformers decides by a module-level weak reference to this object, so it must live through the load and must be
    gone before another model, with another config, is loaded.
    """
    if deepspeed_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # zero.Init wants a consistent batch triple before any engine exists
    pairs = deepspeed_config["train_micro_batch_size_per_gpu"] * deepspeed_config.get("gradient_accumulation_steps", 1)
    keep_alive = HfDeepSpeedConfig({**deepspeed_config, "train_batch_size": pairs * ranks.world_size()})
    try:
        yield
    finally:
        del keep_alive
        unset_hf_deepspeed_config()


def _without_prints() -> redirect_stdout:
    """DeepSpeed's optimizers print memory figures while they are built; its log messages are not affected."""
    return redirect_stdout(io.StringIO())


def trained_parameters(module: torch.nn.Module) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """The parameters that are trained, by name, as the optimizer groups them: matrices, then norms and biases."""
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    # a ZeRO-3 shard is flat, so its true rank is read from the shape it stands for
    is_matrix = [len(getattr(p, "ds_shape", p.shape)) >= 2 for _, p in trained]
    return [[pair for pair, matrix in zip(trained, is_matrix, strict=True) if matrix is kind] for kind in (True, False)]


def initialize_policy(
    module: torch.nn.Module, deepspeed_config: dict[str, Any], weight_decay: float
) -> DeepSpeedEngine:
    """A DeepSpeed engine that trains `module`; norms and biases are exempt from weight decay, as usual.

    Raises:
        ConfigError: if the optimizer does not take one of `train.optim_args`.
    """
    import deepspeed

    matrices, others = trained_parameters(module)
    groups = [
        {"params": [parameter for _, parameter in pairs], "weight_decay": decay}
        for pairs, decay in ((matrices, weight_decay), (others, 0.0))
        if pairs
    ]
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for _, p in matrices + others)
    deepspeed_config = with_fitting_buckets(deepspeed_config, num_parameters)
    if deepspeed_config["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu":
        say_if_one_thread_is_left()
    try:
        with _without_prints():
            return deepspeed.initialize(model=module, model_parameters=groups, config=deepspeed_config)[0]
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ConfigError(f"train.optim_args: the optimizer does not take one of them: {error}") from None


def say_if_one_thread_is_left() -> None:
    """Tell whoever offloads the optimizer to the host that `torchrun` leaves its step one thread a rank."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // (ranks.local_world_size() or 1)
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if by_torchrun and share > 1 and ranks.device().type != "cpu":
        ranks.log(
            "WARNING: deepspeed.offload_optimizer = 'cpu': the optimizer's step has one thread a rank, since torchrun "
            f"sets OMP_NUM_THREADS to 1 where it is not set; set it to {share}, this rank's share of the cores"
        )


def initialize_reference(module: torch.nn.Module, deepspeed_config: dict[str, Any]) -> DeepSpeedEngine:
    """A DeepSpeed engine without an optimizer that runs `module` forward only (stage 0 or 3)."""
    import deepspeed

    module.eval().requires_grad_(False)
    with _without_prints():
        engine = deepspeed.initialize(model=module, config=deepspeed_config)[0]
    engine.eval()
    return engine


def release(engine: DeepSpeedEngine) -> None:
    """Give back the memory of an engine that is not needed any more."""
    import gc

    from deepspeed.accelerator import get_accelerator

    engine.destroy()
    for parameter in engine.module.parameters():
        # emptied rather than left to the garbage collector: DeepSpeed's hooks hold references to the module
        parameter.data = parameter.data.new_empty(0)
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)
    gc.collect()
    get_accelerator().empty_cache()


def loss_scale_for_mean(global_batch_pairs: int) -> float:
    """Factor from a rank's *sum* of pair losses to what the engine must see.

    The engine averages gradients over the W ranks: sum_r grad(c * sum of rank r) / W is the gradient of the mean over
    the G pairs of the global batch if c = W / G, however the pairs are spread over ranks and micro-steps.
    """
    return ranks.world_size() / global_batch_pairs


def backward(engine: DeepSpeedEngine, loss: torch.Tensor, *, last_micro_step: bool) -> None:
    """One micro-step's backward pass; gradients are reduced where the stage does so, at the latest at the last.

    A loss that is not finite makes the whole gradient NaN, which `optimizer_step` never applies; its own gradient may
    be finite, even zero. A finite loss is multiplied by 1.
    """
    engine.set_gradient_accumulation_boundary(last_micro_step)
    engine.backward(loss * (1.0 + 0.0 * loss.detach()), scale_wrt_gas=False)


def optimizer_step(engine: DeepSpeedEngine, learning_rate: float, max_grad_norm: float) -> tuple[torch.Tensor, bool]:
    """Clip, update the weights, clear the gradients. A gradient that is not finite on any rank changes nothing.

    Returns:
        The gradient's global 2-norm before clipping, a scalar that the device may still be working on, and whether
        fp16's loss scale was too large for the gradient.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    norm = None
    if engine.zero_optimization_stage() == 0 and not engine.fp16_enabled():
        # DeepSpeed tells no norm for a plain optimizer; the gradients are whole and reduced here
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(norm.item()):  # as its ZeRO and fp16 optimizers do by themselves
            engine.optimizer.zero_grad()
            return norm, False
    engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
        norm = torch.as_tensor(float("nan") if norm is None else norm)
    overflowed = engine.fp16_enabled() and bool(getattr(engine.optimizer, "overflow", False))
    return norm, overflowed


def consolidated_state_dict(engine: DeepSpeedEngine, *, trained_only: bool = False) -> dict[str, torch.Tensor] | None:
    """The whole model's weights in the engine's precision, by the names of the engine's module; None off rank 0.

    Every rank must call it: at stage 3 the weights are gathered layer by layer onto rank 0's host memory.

    Args:
        trained_only: leave out frozen parameters and buffers.
    """
    if engine.zero_optimization_stage() == 3:
        state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=trained_only)
    else:
        state = engine.module.state_dict() if ranks.is_main() else None
    if state is None or not trained_only:
        return state
    trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in state.items() if name in trained}


def own_slice(parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's share of a parameter's values, flat, cut as ZeRO-3 cuts it at every stage.

    It is a view of the shard or, where the parameter is replicated, of the whole, so nothing is communicated.
    """
    numel = getattr(parameter, "ds_numel", parameter.numel())
    size = -(-numel // ranks.world_size())
    start = min(ranks.rank() * size, numel)
    length = min(size, numel - start)
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach().flatten()[start : start + length]
    # MiCS and other groups smaller than the world are refused with a moving reference, the only user of slices
    assert parameter.ds_tensor.numel() == size
    return parameter.ds_tensor.detach()[:length]


def write_slices(engine: DeepSpeedEngine, slices: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Replace parameters of a forward-only engine's module by the ranks' slices of new values.

    Every rank must call it. At stage 3 each rank writes its own shards and nothing is sent; a replicated parameter is
    put together from all ranks' slices, one parameter at a time.

    Args:
        slices: (name, this rank's slice as `own_slice` cuts it, of any dtype and device), one at a time.
    """
    from deepspeed.accelerator import get_accelerator

    # parameters that are whole at the moment (small ones stay so between passes) would not see a change of their shard
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.empty_partition_cache()
    parameters = dict(engine.module.named_parameters())
    with torch.no_grad():
        for name, values in slices:
            parameter = parameters[name]
            if hasattr(parameter, "ds_tensor"):
                own_slice(parameter).copy_(values)
                continue
            size = -(-parameter.numel() // ranks.world_size())
            padded = parameter.new_zeros(size)
            padded[: len(values)] = values
            parameter.copy_(ranks.gather_rows(padded)[: parameter.numel()].view_as(parameter))
    if engine.zero_optimization_stage() == 3:
        # DeepSpeed gathers shards on a stream of its own, which waits for nothing: it must not read them before they
        # are written
        get_accelerator().synchronize()
