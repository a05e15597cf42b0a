"""A registry that misbehaves on request.

It ships with the package because three readers need the same one: the unit tests, the benchmarks,
and `pullpool demo`. Nothing here is imported by the serving path.
"""

from __future__ import annotations

from proxy.testing.clock import FakeClock
from proxy.testing.counters import Counters, Moment, Seen
from proxy.testing.faults import (
    Action,
    Answer,
    Corrupt,
    Cut,
    Disconnect,
    EmptyAccess,
    Fault,
    Hang,
    IgnoreRange,
    Oversize,
    Raw,
    Reset,
    ShortLength,
    Stall,
    WrongContentRange,
    WrongDigestHeader,
)
from proxy.testing.holds import Hold
from proxy.testing.images import FakeBlob, FakeImage, FakeIndex, make_image, make_index
from proxy.testing.overload import POISONED_TOKEN, Misbehaviour, Overload
from proxy.testing.quota import PullQuota
from proxy.testing.registry import FakeRegistry
from proxy.testing.wire import Kind

__all__ = [
    "POISONED_TOKEN",
    "Action",
    "Answer",
    "Corrupt",
    "Counters",
    "Cut",
    "Disconnect",
    "EmptyAccess",
    "FakeBlob",
    "FakeClock",
    "FakeImage",
    "FakeIndex",
    "FakeRegistry",
    "Fault",
    "Hang",
    "Hold",
    "IgnoreRange",
    "Kind",
    "Misbehaviour",
    "Moment",
    "Overload",
    "Oversize",
    "PullQuota",
    "Raw",
    "Reset",
    "Seen",
    "ShortLength",
    "Stall",
    "WrongContentRange",
    "WrongDigestHeader",
    "make_image",
    "make_index",
]
