"""Every origin in use: those of configured upstreams, and those that redirects lead to.

At most one for each (scheme, host, port), whoever asks, so that its gate counts all its sockets.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from yarl import URL

from proxy.observe.logs import Logger
from proxy.observe.metrics import GateState, Metrics, OriginState
from proxy.upstream.budget import RetryBudget
from proxy.upstream.endpoint import OriginKey, OriginSettings
from proxy.upstream.learned import CapBook
from proxy.upstream.leases import LeaseSource, RateLimit
from proxy.upstream.origin import Origin
from proxy.upstream.ring import Rings


class Origins:
    """Every origin in use: those of configured upstreams, and those that redirects lead to."""

    #: Redirect targets kept at most; those without turns leave first.
    MAX_FOREIGN = 256

    def __init__(
        self,
        *,
        metrics: Metrics,
        clock: Callable[[], float],
        log: Logger | None = None,
        caps: CapBook | None = None,
        budget: Callable[[], RetryBudget] = RetryBudget,
        leases: LeaseSource | None = None,
    ) -> None:
        """``caps`` remembers the caps of configured upstreams across a restart, ``budget`` makes
        the retry budget of an origin, ``leases`` are those of caps that nodes share."""
        self._metrics = metrics
        self._clock = clock
        self._log = log
        self._caps = caps
        self._budget = budget
        self._leases = leases
        self._rings = Rings()
        self._own: dict[OriginKey, Origin] = {}
        self._foreign: OrderedDict[OriginKey, Origin] = OrderedDict()

    def add(self, url: URL, settings: OriginSettings, rate: RateLimit | None = None) -> Origin:
        """The origin of a configured upstream. Upstreams that share one share its gate, which
        takes the settings of the first."""
        key = OriginKey.of(url)
        if key not in self._own:
            self._own[key] = Origin(
                key,
                settings,
                metrics=self._metrics,
                clock=self._clock,
                rate=rate,
                log=self._log,
                caps=self._caps,
                budget=self._budget(),
                rings=self._rings,
                leases=self._leases,
            )
        return self._own[key]

    async def foreign(self, url: URL, settings: OriginSettings) -> Origin:
        """The origin of a redirect or of a token service, made when it is first met.

        Nothing is awaited after it was found or made: ask it for a turn before anything else, and
        it cannot be forgotten meanwhile. Raises ``ValueError`` as ``OriginKey.of`` does.
        """
        key = OriginKey.of(url)
        if key not in self._own and key not in self._foreign:
            await self._forget_one()
        known = self._own.get(key) or self._foreign.get(key)
        if known is None:
            known = Origin(
                key,
                settings,
                metrics=self._metrics,
                clock=self._clock,
                log=self._log,
                budget=self._budget(),
                rings=self._rings,
                leases=self._leases,
            )
            self._foreign[key] = known
        elif key in self._foreign:
            self._foreign.move_to_end(key)
        return known

    async def _forget_one(self) -> None:
        """Make place for one more: the origin that was not asked for longest goes."""
        for key, origin in list(self._foreign.items()):
            if len(self._foreign) < self.MAX_FOREIGN:
                return
            if origin.is_in_use:
                continue
            # Still in the table, so that whoever asks meanwhile finds this gate and no second one.
            await origin.shut_idle()
            if self._foreign.get(key) is origin and not origin.is_in_use and not origin.is_open:
                del self._foreign[key]
                await origin.close()

    def details(self) -> list[Mapping[str, Any]]:
        """What is known of each origin, for the status page."""
        return [origin.conduct.details() for origin in self._all()]

    def conditions(self) -> list[OriginState]:
        """Breakers and quotas, for metrics."""
        return [origin.conduct.state() for origin in self._all()]

    def _all(self) -> tuple[Origin, ...]:
        return (*self._own.values(), *self._foreign.values())

    def states(self) -> list[GateState]:
        return [origin.state() for origin in self._all()]

    async def close(self) -> None:
        for origin in self._all():
            await origin.close()
        self._own.clear()
        self._foreign.clear()
