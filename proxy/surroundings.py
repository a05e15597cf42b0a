"""Clocks, pauses and the environment: what a proxy takes from the world around it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from proxy.pull.asking import Pause, short_pause
from proxy.pull.flight_settings import FlightSettings
from proxy.team.channel import BEAT
from proxy.team.roles import START
from proxy.upstream.budget import RetryBudget
from proxy.web.descriptors import current_limit
from proxy.web.watch import INTERVAL


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a proxy takes from the world around it, so that tests can bring their own.

    ``clock`` is monotonic, a fill's too, ``wall`` since the epoch, in seconds; the pauses give the
    seconds before try ``n`` of a short question and of a fill, ``budget`` an origin's retry budget.
    ``beat`` and ``role_patience`` are those of ``proxy/team``, ``watch`` is the seconds between two
    looks at how late the loop runs.
    """

    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    short_pause: Pause = short_pause
    fill_pause: Pause = FlightSettings().pause
    fill_clock: Callable[[], float] = time.monotonic
    budget: Callable[[], RetryBudget] = RetryBudget
    descriptors: Callable[[], int] = current_limit  # how many may be open
    beat: float = BEAT
    role_patience: float = START
    watch: float = INTERVAL
