"""The ranks meet: the process group, within a stated time, or an error that says what to set.

What goes wrong between machines mostly is that one of them tells the others an address that leads nowhere. A host name
that stands for 127.0.1.1, as Debian sets it up, is such an address for gloo, which asks the host name. So gloo is told
which network leads to MASTER_ADDR. NCCL looks for a network itself, and leaves out the loopback one.
"""

from __future__ import annotations

import datetime
import fcntl
import ipaddress
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from dpo_scale.distributed import ranks
from dpo_scale.errors import EXIT_USER_ERROR, ConfigError

SIOCGIFADDR = 0x8915  # Linux: the address of a network interface
SECONDS_TO_SPEAK = 5.0  # for torch, which knows better what went wrong


def join(timeout_minutes: float, start_timeout_minutes: float = 10.0) -> None:
    """Join the process group; `deepspeed`, `torchrun` and plain `python` (one rank) all end up here.

    Args:
        timeout_minutes: a collective that one rank waits in for longer raises on that rank, which ends the run.
        start_timeout_minutes: how long the ranks may take to meet.

    Raises:
        ConfigError: naming this host and what to set, if the ranks do not meet.
    """
    if "RANK" not in os.environ:  # plain python: without these DeepSpeed would look for MPI
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from torch.distributed.distributed_c10d import _set_pg_timeout

    use_expandable_segments(get_accelerator().device_name())
    if get_accelerator().device_name() == "cpu":
        # gloo alone is right and starts at once; the shared-memory op would be compiled first (about 20 s)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().set_device(ranks.local_rank())
    backend = get_accelerator().communication_backend_name()
    name_network(backend)
    with _in_time(start_timeout_minutes):
        start = datetime.timedelta(minutes=start_timeout_minutes)
        deepspeed.init_distributed(dist_backend=backend, timeout=start, verbose=False)
        ranks.gather_objects(None)  # NCCL connects in its first collective
    _set_pg_timeout(datetime.timedelta(minutes=timeout_minutes))


def name_network(backend: str) -> None:
    """Tell gloo which network the other machines are on, where this host's own name leads to no other machine."""
    on_one_machine = ranks.local_world_size() == ranks.world_size() or os.environ["MASTER_ADDR"] in (
        "127.0.0.1",
        "localhost",
    )
    if backend != "gloo" or on_one_machine or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    own = _own_address()
    if own is not None and not ipaddress.ip_address(own).is_loopback:
        return
    interface = _interface_towards(os.environ["MASTER_ADDR"])
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        print(
            f"{socket.gethostname()}: this host's name means {own or 'no address'}; gloo takes the network {interface} "
            "(GLOO_SOCKET_IFNAME names another)",
            flush=True,
        )


def _own_address() -> str | None:
    """What this host's name stands for here."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _interface_towards(host: str) -> str | None:
    """The network interface that leads to a host; if that is this one, its only one. None if there is no such one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        addresses = {}
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # an interface without an address
                address = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
                if not ipaddress.ip_address(address).is_loopback:
                    addresses[address] = name
        try:
            probe.connect((host, 9))  # of a datagram socket: nothing is sent
        except OSError:
            return None
        towards = addresses.get(probe.getsockname()[0])
    return next(iter(addresses.values())) if towards is None and len(addresses) == 1 else towards


@contextmanager
def _in_time(minutes: float) -> Iterator[None]:
    """Say what to set if the ranks do not meet in the block; end the process if it never returns, as gloo may not."""

    def refusal(reason: str) -> ConfigError:
        names = ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        said = ", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in names)
        return ConfigError(
            f"{socket.gethostname()}: rank {ranks.rank()} of {ranks.world_size()} could not reach the others within "
            f"{minutes:g} minutes (deepspeed.start_timeout_minutes): {reason}. MASTER_ADDR must be an address of the "
            "first machine that all others reach; GLOO_SOCKET_IFNAME (on CPUs) or NCCL_SOCKET_IFNAME (on GPUs) must "
            f"name each machine's interface to that network. Here this host's name means {_own_address()}, and {said}"
        )

    def give_up() -> None:
        print(f"error: {refusal('no answer')}", file=sys.stderr, flush=True)
        os._exit(EXIT_USER_ERROR)

    timer = threading.Timer(minutes * 60 + SECONDS_TO_SPEAK, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:  # torch's DistError and gloo's failures are RuntimeErrors
        if ranks.world_size() == 1:
            raise
        raise refusal(" ".join(str(error).split())[:300]) from None
    finally:
        timer.cancel()


# What torch 2.11 to 2.13 read the settings of CUDA's allocator from, the first that is set, when CUDA starts.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def use_expandable_segments(device_name: str) -> None:
    """Let CUDA's allocator grow its segments, unless one of its variables is set. Before anything is on the device.

    Micro-batches of ever other lengths and the gathers of ZeRO-3 otherwise leave memory in pieces that nothing fits.
    """
    is_nvidia = device_name == "cuda" and torch.version.hip is None  # torch 2.11 ignores it on ROCm
    if is_nvidia and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
