"""A network of one machine's own: namespaces on a bridge, each with a line of a limited rate.

What a fleet gains depends on the lines between its nodes, and loopback has none. So every node gets
a network namespace (ip-netns(8)) with one end of a veth(4) pair; the other ends meet in a bridge.
`tbf` (tc-tbf(8)) shapes both directions: what leaves the node at its own end (the uplink), what
comes to it at the bridge's (the downlink). What a node's own clients pull goes over the namespace's
loopback and is not shaped.

Nets that will speak with one another are *introduced*: each has the others' hardware addresses for
good. The kernel's table of those it finds out itself is one for all namespaces (arp(7)), and holds
1,024: among 48 nodes that all speak with each other connections would time out.

The bridge has an address in the namespace of whoever measures, unshaped, so that parts can be asked
how they are. All names carry a random suffix: two networks of one machine do not meet. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.parts import KIB, PartFailed

#: Milliseconds that a packet may wait in a shaped line before it is dropped: what a switch buffers,
#: a few times over. In a longer queue answers of the directory wait behind bulk.
LATENCY_MS = 50
#: How TCP finds the rate of a line: as kernels do unless they are told otherwise. Machines that are
#: told to use bbr send 6 % of all bytes twice through queues as short as these.
CONGESTION = "cubic"
#: Bytes that may leave at once: a segment as large as the kernel hands to a device.
LEAST_BURST = 64 * KIB


@dataclass(frozen=True, slots=True)
class Net:
    """A namespace, and the address of what runs there."""

    name: str
    address: str
    mac: str

    def inside(self, command: Sequence[str]) -> tuple[str, ...]:
        """The command that runs this one there."""
        return ("ip", "netns", "exec", self.name, *command)


class Network:
    """Nets that reach one another through a bridge."""

    def __init__(self, bridge: str, prefix: str, suffix: str) -> None:
        self._bridge = bridge
        self._prefix = prefix
        self._suffix = suffix
        self._nets: list[str] = []

    @property
    def gateway(self) -> str:
        """The address of whoever measures."""
        return f"{self._prefix}.0.1"

    def join(self, rate: int | None) -> Net:
        """A new net; its line carries `rate` bytes a second each way. Raises PartFailed."""
        number = len(self._nets) + 1
        name, outer = f"pp{self._suffix}-{number}", f"pp{self._suffix}v{number}"
        address = f"{self._prefix}.{1 + number // 250}.{1 + number % 250}"
        run("ip", "netns", "add", name)
        self._nets.append(name)
        mac = f"02:70:70:00:{number // 256:02x}:{number % 256:02x}"
        run(
            *("ip", "link", "add", outer, "type", "veth"),
            *("peer", "name", "line", "address", mac, "netns", name),
        )
        run("ip", "link", "set", outer, "master", self._bridge, "up")
        inside = ("ip", "-n", name)
        run(*inside, "addr", "add", f"{address}/16", "dev", "line")
        run(*inside, "link", "set", "line", "up")
        run(*inside, "link", "set", "lo", "up")
        route = (f"{self._prefix}.0.0/16", "dev", "line", "congctl", CONGESTION)
        run(*inside, "route", "replace", *route)
        if rate is not None:
            run("tc", "qdisc", "add", "dev", outer, "root", *shape(rate))
            run("tc", "-n", name, "qdisc", "add", "dev", "line", "root", *shape(rate))
        return Net(name, address, mac)

    @staticmethod
    def introduce(nets: Sequence[Net]) -> None:
        """Tells each where all the others are. Raises PartFailed."""
        for net in nets:
            known = "".join(
                f"neigh replace {other.address} lladdr {other.mac} dev line nud permanent\n"
                for other in nets
                if other is not net
            )
            run("ip", "-n", net.name, "-batch", "-", said=known)

    def leave(self) -> None:
        """Takes every net away; what runs in one must have ended."""
        for name in self._nets:
            subprocess.run(("ip", "netns", "del", name), check=False, capture_output=True)
        subprocess.run(("ip", "link", "del", self._bridge), check=False, capture_output=True)


def shape(rate: int) -> tuple[str, ...]:
    """What tc is told of a line of `rate` bytes a second."""
    burst = max(LEAST_BURST, rate // 50)
    return ("tbf", "rate", f"{rate}bps", "burst", f"{burst}b", "latency", f"{LATENCY_MS}ms")


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """An empty network until the block ends. Raises PartFailed where there can be none."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        raise PartFailed("network namespaces need root, and ip and tc (Debian's iproute2)")
    suffix = secrets.token_hex(3)
    prefix = f"10.{200 + secrets.randbelow(50)}"
    made = Network(f"pp{suffix}br", prefix, suffix)
    try:
        run("ip", "link", "add", f"pp{suffix}br", "type", "bridge")
        run("ip", "addr", "add", f"{made.gateway}/16", "dev", f"pp{suffix}br")
        run("ip", "link", "set", f"pp{suffix}br", "up")
        yield made
    finally:
        made.leave()


def run(*command: str, said: str | None = None) -> None:
    """`said` is its standard input. Raises PartFailed with what it answered."""
    done = subprocess.run(command, input=said, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PartFailed(f"{' '.join(command)}: {done.stderr.strip()}")
