"""When a DAG runs: Airflow's timetables, as far as they are known by name."""

from dataclasses import dataclass
from enum import StrEnum

from pydantic import JsonValue

from pgflow_prefect.definitions.airflow.values import Fields, read_seconds, read_text, unwrap, write_value

PRESETS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@quarterly": "0 0 1 */3 *",
    "@yearly": "0 0 1 1 *",
}
"""Airflow's names of cron expressions."""


class ScheduleKind(StrEnum):
    """What decides when a DAG runs."""

    NONE = "none"
    """Nothing: it is triggered."""

    CRON = "cron"
    INTERVAL = "interval"
    ONCE = "once"
    CONTINUOUS = "continuous"
    ASSETS = "assets"
    OTHER = "other"
    """A timetable that is not known by name, such as one of the team's own."""


@dataclass(frozen=True)
class Schedule:
    """When a DAG runs.

    Attributes:
        kind: what decides it.
        name: the class of the timetable, without its module.
        cron: the expression, for `CRON`.
        seconds: between two runs, for `INTERVAL`.
        timezone: its name; UTC where the document does not say.
        has_interval: a run is for the time between two dates, and starts at its end.
        text: what else the timetable says, without secrets.
    """

    kind: ScheduleKind
    name: str = ""
    cron: str | None = None
    seconds: float | None = None
    timezone: str = "UTC"
    has_interval: bool = False
    text: str = ""


_CRON = {"CronDataIntervalTimetable": True, "CronTriggerTimetable": False}
_INTERVAL = {"DeltaDataIntervalTimetable": True, "DeltaTriggerTimetable": False}
_PLAIN = {
    "NullTimetable": ScheduleKind.NONE,
    "OnceTimetable": ScheduleKind.ONCE,
    "ContinuousTimetable": ScheduleKind.CONTINUOUS,
    "DatasetTriggeredTimetable": ScheduleKind.ASSETS,
    "AssetTriggeredTimetable": ScheduleKind.ASSETS,
}
_OWN_MODULES = ("airflow.timetables.", "airflow.sdk.definitions.timetables.")


def read_schedule(fields: Fields) -> Schedule:
    """Return when a DAG runs, by the fields of its document."""
    if "timetable" not in fields:
        return _read_interval(fields.get("schedule_interval"), _read_zone(fields.get("timezone")))
    timetable = fields["timetable"]
    path = (read_text(timetable.get("__type")) if isinstance(timetable, dict) else None) or ""
    value = unwrap(timetable)
    said = value if isinstance(value, dict) else {}
    name = path.rpartition(".")[2]
    text = "" if not said else write_value("", said)
    zone = _read_zone(said.get("timezone")) if "timezone" in said else _read_zone(fields.get("timezone"))
    if path.startswith(_OWN_MODULES):
        if name in _PLAIN:
            return Schedule(_PLAIN[name], name, text=text)
        cron = read_text(said.get("expression"))
        if name in _CRON and cron:
            # A trigger has an interval only where one was given.
            interval = _CRON[name] or bool(read_seconds(said.get("interval")))
            return Schedule(ScheduleKind.CRON, name, PRESETS.get(cron, cron), None, zone, interval, text)
        seconds = read_seconds(said.get("delta"))
        if name in _INTERVAL and seconds:
            interval = _INTERVAL[name] or bool(read_seconds(said.get("interval")))
            return Schedule(ScheduleKind.INTERVAL, name, None, seconds, zone, interval, text)
    return Schedule(ScheduleKind.OTHER, name, timezone=zone, text=text)


def _read_interval(value: JsonValue, zone: str) -> Schedule:
    """Return the schedule of a document without a timetable, which older ones leave out for a plain interval."""
    given = unwrap(value)
    if given is None:
        return Schedule(ScheduleKind.NONE)
    if given == "@once":
        return Schedule(ScheduleKind.ONCE)
    if given == "@continuous":
        return Schedule(ScheduleKind.CONTINUOUS)
    if isinstance(given, str):
        return Schedule(ScheduleKind.CRON, "", PRESETS.get(given, given), None, zone, has_interval=True)
    seconds = read_seconds(value)
    if seconds:
        return Schedule(ScheduleKind.INTERVAL, "", None, seconds, zone, has_interval=True)
    return Schedule(ScheduleKind.OTHER, text=write_value("", value))


def _read_zone(value: JsonValue) -> str:
    given = unwrap(value)
    if isinstance(given, str):
        return given
    seconds = read_seconds(value)
    return "UTC" if not seconds else f"UTC+{seconds / 3600:g}"
