"""The kinds of storm: what goes wrong in each, what may follow from that, and what its broken fence shows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Redone(StrEnum):
    """Which work may be done again though its handler has not failed."""

    NOTHING = "nothing"
    """No process dies, and no connection of a step breaks."""

    WRITTEN = "written"
    """That of steps with a transaction on `context.connection`: their connections break."""

    ANYTHING = "anything"
    """The processes die."""


@dataclass(frozen=True)
class Twin:
    """The same storm with a broken fence.

    Attributes:
        signs: what the verdict has to have. The storm blows until it has them.
        cards: what goes wrong; the storm's own, where not given.
        settings: beside the storm's.
        longest: seconds that a step works at most.
        patience: seconds in which no run ends and no handler is called, after which there is no more to come.
        level: how many of the fences in PostgreSQL are broken; 0 where the fence is one of the workers' own.
    """

    signs: tuple[str, ...]
    cards: tuple[str, ...] | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    longest: float = 0.5
    patience: float = 120.0
    level: int = 0


@dataclass(frozen=True)
class Weather:
    """A kind of storm.

    Attributes:
        cards: what goes wrong, as often as it is in the list; see `troubles`.
        redone: what may be done again.
        twin: the same with a broken fence.
        settings: of the workers.
        options: of the workers' role in PostgreSQL.
        workers: how many at most. A single one can lose a run only to itself, and must not on the slowest machine.
        concurrency: runs of a worker at the same time.
        longest: seconds that a step works at most.
        pauses: seconds between two troubles, from and to.
        shakes_servers: no other storm can be judged at the same time.
    """

    cards: tuple[str, ...]
    redone: Redone
    twin: Twin
    settings: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    workers: int | None = 1
    concurrency: int = 12
    longest: float = 0.3
    pauses: tuple[float, float] = (0.5, 2.0)
    shakes_servers: bool = False


SETTINGS = {
    "PGFLOW_LEASE": "3",
    "PGFLOW_RECONCILE_INTERVAL": "5",
    "PGFLOW_SWEEP_INTERVAL": "1",
    "PGFLOW_REPORT_TIMEOUT": "300",  # whatever the machine's speed, no trouble lasts as long
    "PGFLOW_MAX_RECOVERIES": "50",  # these owners vanish because we kill them
}
"""Of all workers, where a storm's own say nothing else."""

_CRASHES = ("kill",) * 5 + ("postgres",) * 2 + ("prefect",)
_LIMITS = ("limited role", "limited database", "full server")
_DOINGS = {"PGFLOW_LEASE": "1"}
_IMPATIENT = {"statement_timeout": "1s"}

# A silent link is found after a third of this, and there has to be time for the report after that.
_SILENCE = {"PGFLOW_REPORT_TIMEOUT": "45", "PGFLOW_CONNECT_TIMEOUT": "5"}

WEATHERS: dict[str, Weather] = {
    "crashes": Weather(
        cards=_CRASHES,
        redone=Redone.ANYTHING,
        settings={"PGFLOW_REPORT_TIMEOUT": "60"},
        workers=None,
        concurrency=4,
        longest=0.05,
        pauses=(2.0, 6.0),
        shakes_servers=True,
        twin=Twin(
            signs=(": was completed at the attempts [", ": has rows of the attempts ["),
            cards=(),
            # An owner who extends its lease learns that it has lost its run; where two are wanted, none does.
            settings={"PGFLOW_LEASE": "600"},
            level=5,
        ),
    ),
    "connection-limits": Weather(
        cards=_LIMITS,
        redone=Redone.NOTHING,
        settings=_DOINGS,
        longest=1.5,  # longer than a lease
        twin=Twin(signs=("was executed again",), cards=("limited role",), longest=4.0),
    ),
    "statement-timeout": Weather(
        cards=("locked runs", "locked leases"),
        redone=Redone.NOTHING,
        options=_IMPATIENT,
        twin=Twin(signs=("is failed: ",), cards=("locked runs",)),
    ),
    "silence": Weather(
        cards=("silent links", "silent database"),
        redone=Redone.WRITTEN,
        settings=_SILENCE,
        # A step whose transaction is lost over and over for as long as its patience fails: not so densely.
        pauses=(15.0, 25.0),
        twin=Twin(signs=("is pending",), cards=("silent links",), patience=45.0),
    ),
    "read-only": Weather(
        cards=("read-only role", "standby"),
        redone=Redone.WRITTEN,
        shakes_servers=True,
        twin=Twin(signs=("was executed again",), cards=("read-only role",)),
    ),
    "second-installation": Weather(
        cards=("copy",),
        redone=Redone.NOTHING,
        twin=Twin(signs=("Prefect has shown",)),
    ),
}
"""Those that have a storm of their own."""

MIXED = "mixed"

WEATHERS[MIXED] = Weather(
    cards=(
        *_CRASHES,
        *_LIMITS,
        *("locked runs", "locked leases", "silent links", "silent database", "read-only role", "standby", "copy"),
    ),
    redone=Redone.ANYTHING,
    # A silent link is found after a third of this; see `silence` for why it is no less.
    settings={"PGFLOW_REPORT_TIMEOUT": "60", "PGFLOW_CONNECT_TIMEOUT": "5"},
    options=_IMPATIENT,
    workers=None,
    concurrency=4,
    longest=0.05,
    pauses=(2.0, 6.0),
    shakes_servers=True,
    twin=WEATHERS["crashes"].twin,
)
