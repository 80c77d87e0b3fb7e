"""Finds times for steps that were completed before the flow run began."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property

from pgflow_prefect.definitions.graph import Graph, find_layers

_TICK = timedelta(milliseconds=1)


@dataclass(frozen=True)
class Past:
    """Moments for the steps that a former flow run completed, in topological order.

    Prefect's graph places a task run by its times. The real times of these steps are older than this flow run, perhaps
    by days. If all had the same time, arrows would run backwards. So they end between the flow run's start and now, one
    layer after the other.

    Attributes:
        graph: the run's steps.
        began_at: when the flow run began; None if Prefect does not say.
        now: all of them are shown before this moment.
    """

    graph: Graph
    began_at: datetime | None
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def find_times(self, slug: str) -> tuple[datetime, datetime]:
        """Return the begin and the end that Prefect shows for a step."""
        began_at = self.now - self._tick * (len(self._layers) - self._depths[slug])
        return began_at, began_at + self._tick

    @cached_property
    def _layers(self) -> list[list[str]]:
        return find_layers(self.graph)

    @cached_property
    def _depths(self) -> dict[str, int]:
        return {slug: depth for depth, layer in enumerate(self._layers) for slug in layer}

    @cached_property
    def _tick(self) -> timedelta:
        """The time of each layer, so that all of them fit between the flow run's start and now."""
        if self.began_at is None:
            return _TICK
        room = max(self.now - self.began_at, timedelta()) / (len(self._layers) + 1)
        return max(min(_TICK, room), timedelta(microseconds=1))
