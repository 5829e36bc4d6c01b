"""Machines for tests: network and UTS namespaces joined by a bridge, each with its own name.

A `Node` has its own address, host name and /etc/hosts (so that names resolve to addresses on the
bridge, not to 127.0.0.1). Its processes reach other nodes over a virtual cable, which `link_down`
disconnects. The file system is shared, as on a cluster. Without root, CAP_NET_ADMIN and iproute2
`machines` raises PermissionError.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "bigan-"  # of namespaces
NEEDED = (
    "these tests make network namespaces: run them as root with CAP_NET_ADMIN and CAP_SYS_ADMIN "
    "(`sudo -E`, or a container with both) and install `ip` (iproute2) and `unshare` (util-linux)"
)


@dataclass
class Node:
    """One machine of `machines`: `name` is its host name, `address` its IPv4 address."""

    name: str
    address: str
    namespace: str
    switch: str  # the namespace that holds the other end of the cable, which has the node's name
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self, command: Sequence[str | Path], environment: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command on this machine, in the folder of `log`, which receives its output."""
        # ip netns exec gives /etc/netns/<namespace>/hosts as /etc/hosts; unshare the name.
        named = f'hostname {self.name} && exec "$@"'
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        with log.open("wb") as out:  # not a pipe: workers that outlive their launcher keep it open
            process = subprocess.Popen(
                [*enter, "bash", "-c", named, "-", *map(str, command)],
                env=dict(environment),
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.running.append(process)
        return process

    def kill(self) -> None:
        """Send SIGKILL to every process of this machine, as a power cut ends them."""
        for process in self.running:
            process.kill()  # it may not have entered the namespace yet
        _kill_all(self.namespace)
        for process in self.running:
            process.wait()

    def link_down(self) -> None:
        """Disconnect the machine: packets are lost without an error."""
        _ip("-n", self.switch, "link", "set", self.name, "down")

    def link_up(self) -> None:
        """Reconnect the machine."""
        _ip("-n", self.switch, "link", "set", self.name, "up")


@contextlib.contextmanager
def machines(num: int = 2) -> Iterator[list[Node]]:
    """`num` machines that reach each other by name; killed and removed on exit.

    Also removes the machines of test processes that were killed.
    """
    if not (shutil.which("ip") and shutil.which("unshare")) or os.geteuid() != 0:
        raise PermissionError(NEEDED)
    _sweep()
    tag = f"{PREFIX}{os.getpid()}x{secrets.token_hex(3)}"
    # The bridge is in a separate namespace: the host's firewall does not apply there, and
    # addresses cannot collide with those of the host.
    switch = f"{tag}-switch"
    nodes = [Node(f"node{i}", f"10.77.0.{i + 1}", f"{tag}-{i}", switch) for i in range(num)]
    hosts = "127.0.0.1 localhost\n" + "".join(f"{n.address} {n.name}\n" for n in nodes)
    try:
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for node in nodes:
                _connect(node, hosts)
        except subprocess.CalledProcessError as error:
            raise PermissionError(f"{NEEDED}: {error.stderr.strip()}") from None
        yield nodes
    finally:
        for node in nodes:
            node.kill()
            _remove(node.namespace)
        _remove(switch)


def _connect(node: Node, hosts: str) -> None:
    _ip("netns", "add", node.namespace)
    folder = Path("/etc/netns", node.namespace)
    folder.mkdir(parents=True)
    (folder / "hosts").write_text(hosts)
    cable = ["link", "add", node.name, "type", "veth", "peer", "eth0", "netns", node.namespace]
    _ip("-n", node.switch, *cable)
    _ip("-n", node.switch, "link", "set", node.name, "master", "bridge", "up")
    _ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", "eth0")
    _ip("-n", node.namespace, "link", "set", "eth0", "up")
    _ip("-n", node.namespace, "link", "set", "lo", "up")


def _kill_all(namespace: str) -> None:
    for _ in range(200):  # a process may have forked since the listing
        pids = _ip("netns", "pids", namespace, check=False).split()
        if not pids:
            return
        for pid in map(int, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    raise RuntimeError(f"{namespace}: processes {pids} survive SIGKILL")


def _remove(namespace: str) -> None:
    _kill_all(namespace)
    _ip("netns", "del", namespace, check=False)  # also removes its ends of cables
    shutil.rmtree(Path("/etc/netns", namespace), ignore_errors=True)
    with contextlib.suppress(OSError):
        Path("/etc/netns").rmdir()  # unless others use it


def _sweep() -> None:
    """Remove the machines of test processes that no longer exist."""
    for line in _ip("netns", "list", check=False).splitlines():
        name = line.split()[0]
        owner = name.removeprefix(PREFIX).split("x")[0]
        if name.startswith(PREFIX) and owner.isdecimal() and not Path("/proc", owner).exists():
            _remove(name)


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)
    return done.stdout
