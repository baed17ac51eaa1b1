"""Two machines in one: each has its own network, host name, hosts file, processes, /tmp-like folders and clock.

A machine is a set of Linux namespaces, held by its first process. It hangs on a switch, which is a bridge in a network
namespace of its own. Nothing of it has a name outside, so any number of tests can run side by side. All of it is gone
when its first process is, or when the process of the test is, however that ends. What looks for processes by name
(DeepSpeed's runner calls `pkill -f` on every host when it is told to end) finds its own machine's only.

Files are shared, as on a cluster, except for folders that are asked to be each machine's own.
"""

from __future__ import annotations

import functools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.rig import children, environment, overrides
from tiny import ROOT

NAMES = ("node-a", "node-b")
PORT = 29500  # of whatever meets on the first machine: each has all ports to itself
SECONDS_TO_START = 20
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)

# What the first process of a machine does: make the machine, say so, and adopt (and forget) orphans until it is killed.
_MACHINE = """
echo "$1" > /proc/sys/kernel/hostname
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount --bind "$2" /etc/hosts
ip link set lo up
shift 2
while [ $# -gt 1 ]; do mount --bind "$1" "$2"; shift 2; done
echo ready
exec env --ignore-signal=CHLD sleep infinity
"""


@functools.cache
def why_not() -> str | None:
    """Why machines can't be made here; None if they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "machines out of namespaces need root on Linux"
    missing = [name for name in ("ip", "unshare", "nsenter", "setpriv") if not shutil.which(name, path=PATH)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: iproute2, util-linux)"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-ec",
         "ip link add name switch type bridge; ip link add name left type veth peer name right; "
         "mount -t tmpfs tmpfs /run"],
        env={**os.environ, "PATH": PATH}, capture_output=True, text=True,
    )  # fmt: skip
    return f"namespaces can't be made: {tried.stderr.strip()}" if tried.returncode else None


def _hold(namespaces: Sequence[str], script: str, *arguments: object) -> tuple[subprocess.Popen, int]:
    """Make namespaces by a script that says `ready`; what holds them, and the process number of their first process."""
    holder = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "--fork", "--kill-child", "sh", "-euc", script,
         "sh", *map(str, arguments)],
        env={**os.environ, "PATH": PATH}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stderr is not None
    if holder.stdout.readline() != "ready\n":
        raise AssertionError(f"no machine: {holder.stderr.read()}")
    return holder, children(holder.pid)[0]


def _release(holder: subprocess.Popen) -> None:
    """End the first process of namespaces; the kernel ends all others of them, before it can be waited for."""
    holder.kill()
    holder.communicate()


class Settings:
    """The settings of a small run at stage 3, called with those that one test adds.

    Args:
        folder: where all runs have their model and data.
    """

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.folder, self.run_dir = folder, run_dir

    def __call__(self, *more: str) -> list[str]:
        return overrides(self.folder, "deepspeed.stage=3", f"output_dir={self.run_dir}", *more)


class Started:
    """A command on a machine, or the test's own: what it printed, and how it ended."""

    def __init__(self, command: Sequence[object], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                list(map(str, command)), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def running(self) -> bool:
        return self.process.poll() is None

    def ranks(self) -> list[int]:
        """The process numbers, seen from outside, of what a launcher on a machine has started."""
        (launcher,) = children(self.process.pid)
        return children(launcher)

    def kill(self) -> None:
        """SIGKILL to the command, seen from outside; what it has started on its machine goes on."""
        (command,) = children(self.process.pid)
        os.kill(command, signal.SIGKILL)
        self.process.wait(SECONDS_TO_START)

    def wait(self, seconds: float) -> int:
        """The exit code; an error if there is none in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.log.name}: no end within {seconds:g} s\n{self.output()[-3000:]}") from None

    def wait_for(self, text: str, seconds: float = SECONDS_TO_START) -> None:
        until = time.monotonic() + seconds
        while text not in self.output():
            assert self.running() and time.monotonic() < until, f"{text!r} was not said\n{self.output()[-3000:]}"
            time.sleep(0.05)

    def output(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass(frozen=True)
class End:
    """How a command ended, and after how many seconds; no code if it did not."""

    code: int | None
    seconds: float


def ends_of(commands: Sequence[Started], since: float, seconds: float) -> list[End]:
    """Wait until all have ended, or for that long since a time of `time.monotonic`."""
    ends: dict[int, End] = {}
    while len(ends) < len(commands) and time.monotonic() < since + seconds:
        for number, command in enumerate(commands):
            if number not in ends and not command.running():
                ends[number] = End(command.process.returncode, time.monotonic() - since)
        time.sleep(0.05)
    return [ends.get(number, End(None, time.monotonic() - since)) for number in range(len(commands))]


class Machine:
    """One machine; commands on it end with it.

    Attributes:
        name: its host name, which all machines know.
        address: of its one network card, `eth0`.
        folder: where its own folders and the output of its commands are.
        variables: of the environment of all its commands.
    """

    def __init__(self, name: str, address: str, hosts: Path, folder: Path, own: Sequence[Path]) -> None:
        self.name, self.address, self.folder, self._own = name, address, folder, tuple(own)
        binds: list[Path] = []
        for path in self._own:
            path.mkdir(parents=True, exist_ok=True)
            self.own(path).mkdir(parents=True, exist_ok=True)
            binds += [self.own(path), path]
        namespaces = ("--net", "--uts", "--mount", "--pid", "--mount-proc")
        self.variables: dict[str, str] = {}
        self._holder, self.first_process = _hold(namespaces, _MACHINE, name, hosts, *binds)

    def own(self, path: Path) -> Path:
        """Where a folder of the machine's own is to be found from outside."""
        return self.folder / "own" / path.name

    def start(self, *command: object, log: str, **variables: str) -> Started:
        """Start a command in the project's folder.

        Args:
            log: the name of a file in the machine's folder that gets what it prints.
            variables: of its environment, beside those of every test.
        """
        enter = [
            "nsenter",
            "--target",
            self.first_process,
            "--net",
            "--uts",
            "--mount",
            "--pid",
            "env",
            f"--chdir={ROOT}",
        ]
        names = {**environment(), "PATH": PATH, "HOME": str(self.folder), **self.variables, **variables}
        return Started([*enter, *command], self.folder / log, names)

    def run(self, *command: object) -> str:
        """Run a command to its end; what it printed."""
        done = self.start(*command, log="command.txt")
        assert done.wait(SECONDS_TO_START) == 0, f"{command}: {done.output()}"
        return done.output()

    def kill(self) -> None:
        """All its processes end at once, without a word, and its network with them."""
        _release(self._holder)


class Cluster:
    """Two machines on a switch, as a context; they share all files except the folders that are their own.

    Args:
        folder: for what belongs to machines.
        own: folders that each machine has for itself.
        loopback_names: each machine's host name is 127.0.1.1 for itself, as on a fresh Debian.
    """

    def __init__(self, folder: Path, *, own: Sequence[Path] = (), loopback_names: bool = False) -> None:
        self._folder, self._own, self._loopback_names = folder, own, loopback_names
        self._machines: dict[str, Machine] = {}

    def __enter__(self) -> Cluster:
        self._holder, self._switch = _hold(
            ["--net", "--mount"],
            "ip link add name switch type bridge; ip link set switch up; echo ready; exec sleep infinity",
        )
        try:
            for name in NAMES:
                self.boot(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self._machines.values():
            machine.kill()
        _release(self._holder)

    @property
    def machines(self) -> list[Machine]:
        return list(self._machines.values())

    def boot(self, name: str) -> Machine:
        """Start a machine, again if it was killed; its own folders are as it left them."""
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        addresses = {name: f"10.77.0.{number}" for number, name in enumerate(NAMES, start=1)}
        lines = ["127.0.0.1 localhost"]
        lines += [f"127.0.1.1 {name}"] if self._loopback_names else []
        lines += [f"{address} {other}" for other, address in addresses.items() if other != name or len(lines) == 1]
        hosts = folder / "hosts"
        hosts.write_text("\n".join(lines) + "\n")
        machine = Machine(name, addresses[name], hosts, folder, self._own)
        self._machines[name] = machine
        # the kernel may still be taking down the cable of a killed machine: the old one goes first
        port = f"to-{name}"
        self._on_switch(f"! ip link show {port} >/dev/null 2>&1 || ip link del {port}")
        self._on_switch(
            f"ip link add {port} type veth peer name eth0 netns {machine.first_process}; "
            f"ip link set {port} master switch up"
        )
        machine.run("sh", "-ec", f"ip addr add {machine.address}/24 dev eth0; ip link set eth0 up")
        return machine

    def unplug(self, name: str) -> None:
        """The machine's cable is pulled: nobody is told that a connection has ended."""
        self._on_switch(f"ip link set to-{name} down")

    def _on_switch(self, script: str) -> None:
        command = ["nsenter", "--target", str(self._switch), "--net", "sh", "-ec", script]
        done = subprocess.run(command, env={**os.environ, "PATH": PATH}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def start_ranks(self, settings: Sequence[str], *, faults: Sequence[Any] = ()) -> list[Started]:
        """One rank a machine, without a launcher, so that each rank's own exit code is seen."""
        started = []
        for rank, machine in enumerate(self.machines):
            place = {
                "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(len(NAMES)), "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": NAMES[0], "MASTER_PORT": str(PORT),
            }  # fmt: skip
            command = [sys.executable, *self.script(faults), *settings]
            started.append(machine.start(*command, log=f"rank-{rank}.txt", **place))
        return started

    def start_torchrun(
        self, machine: Machine, settings: Sequence[str], *more: str, faults: Sequence[Any] = ()
    ) -> Started:
        """torchrun's part on one machine, with one rank.

        With the variable every meeting of the nodes agrees on an address anew. Without it torchrun (seen in torch 2.13)
        keeps the first one to itself, and a node that is started anew waits for it in vain.
        """
        return machine.start(
            "torchrun", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=1",
            f"--rdzv-endpoint={NAMES[0]}:{PORT}", *more, *self.script(faults), *settings, log="torchrun.txt",
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )  # fmt: skip

    def script(self, faults: Sequence[Any]) -> list[str]:
        if not faults:
            return [str(ROOT / "launch/train.py")]
        pickled = self._folder / "faults.pickle"
        pickled.write_bytes(pickle.dumps(list(faults)))
        return [str(ROOT / "tests/faults/patched_train.py"), str(pickled)]
