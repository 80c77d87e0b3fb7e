"""Finds serialized DAGs in a file or a row of Airflow's database, and brings the versions of the format together."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from pgflow_prefect.definitions.airflow.values import Fields, read_seconds, read_text, unwrap
from pgflow_prefect.errors import UsageError
from pgflow_prefect.wording import clean

VERSIONS = (1, 2, 3)
"""The versions of the format that are read: 1 is Airflow 2's, 2 is that of 3.0 and 3.1, 3 that of later ones."""

MOST_BYTES = 64 * 1024 * 1024
"""The size of a document that is read, and of a file of several."""

MOST_TASKS = 10_000

_OLD_NAMES_OF_DAGS = {"_dag_id": "dag_id", "_task_group": "task_group", "_max_active_tasks": "max_active_tasks"}
_OLD_NAMES_OF_TASKS = {
    "_task_type": "task_type",
    "_downstream_task_ids": "downstream_task_ids",
    "_outlets": "outlets",
    "_inlets": "inlets",
    "_is_setup": "is_setup",
    "_is_teardown": "is_teardown",
    "_on_failure_fail_dagrun": "on_failure_fail_dagrun",
    "task_display_name": "_task_display_name",
}
_OLD_CALLBACKS = tuple(f"on_{event}_callback" for event in ("execute", "failure", "success", "retry", "skipped"))
"""In version 1, they have the code of the function. Later versions only say that there is one."""


@dataclass(frozen=True)
class SerializedDag:
    """A serialized DAG, with the names of version 3.

    Attributes:
        dag_id: the DAG.
        version: the version of the document.
        fields: those of the DAG.
        tasks: the fields of each task; those that a task does not say are those of the document's defaults.
        settings: the settings of Airflow that decide what a task does not say; empty where they are not known.
    """

    dag_id: str
    version: int
    fields: Fields
    tasks: tuple[Fields, ...]
    settings: Fields = field(default_factory=dict)


@dataclass(frozen=True)
class DagFile:
    """The documents of a file, which are read when they are asked for: a DAG that can't be read hides no other.

    Attributes:
        source: what to call the file in an error.
        documents: by the ids of their DAGs.
        settings: those of Airflow that decide what a task does not say; empty where the file has none.
    """

    source: str
    documents: Mapping[str, JsonValue]
    settings: Fields

    def read(self, dag_id: str) -> SerializedDag:
        """Return a DAG of the file.

        Raises:
            UsageError: it is none, or one of a version that is not read.
        """
        return read_document(self.documents[dag_id], self.source, self.settings)


def open_file(text: bytes, source: str) -> DagFile:
    """Find the DAGs of a file.

    Args:
        text: JSON: what the script of `pgflow-prefect airflow dump` writes, one serialized DAG, or a list of them.
        source: what to call it in an error.

    Raises:
        UsageError: it is too big, no JSON, or has something else than serialized DAGs.
    """
    if len(text) > MOST_BYTES:
        raise UsageError(f"{source} has {len(text):,} bytes: more than {MOST_BYTES:,} are not read. Dump fewer DAGs")
    value = _parse(text, source)
    settings: Fields = {}
    if isinstance(value, dict) and "dag" not in value and isinstance(value.get("dags"), dict | list):
        settings = _read_settings(value.get("settings"))
        value = value["dags"]
        value = list(value.values()) if isinstance(value, dict) else value
    documents: dict[str, JsonValue] = {}
    for document in value if isinstance(value, list) else [value]:
        dag_id = _find_id(document, source)
        if dag_id in documents:
            raise UsageError(f"{source} has the DAG {dag_id!r} more than once: leave one in it")
        documents[dag_id] = document
    return DagFile(source, documents, settings)


def read_row(dag_id: str, data: bytes | None, compressed: bytes | None, source: str) -> SerializedDag:
    """Return the DAG of a row of Airflow's table `serialized_dag`.

    Raises:
        UsageError: it can't be read, or is another DAG's.
    """
    if data is None and compressed is not None:
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(compressed, MOST_BYTES + 1)
        except zlib.error as error:
            raise UsageError(f"{source}: its compressed data can't be read: {error}") from error
    if data is None:
        raise UsageError(f"{source} has no data")
    if len(data) > MOST_BYTES:
        raise UsageError(f"{source} has more than {MOST_BYTES:,} bytes, which are not read")
    document = read_document(_parse(data, source), source, {})
    if document.dag_id != dag_id:
        raise UsageError(f"{source} has the document of DAG {document.dag_id[:250]!r}")
    return document


def _find_id(document: JsonValue, source: str) -> str:
    fields = document.get("dag") if isinstance(document, dict) else None
    if not isinstance(fields, dict):
        raise UsageError(
            f"{source} has no serialized DAG: it is to be an object with '__version' and 'dag', or what the script of "
            "`pgflow-prefect airflow dump` writes"
        )
    dag_id = read_text(fields.get("dag_id", fields.get("_dag_id")))
    if not dag_id:
        raise UsageError(f"{source} has a serialized DAG without an id")
    return dag_id


def read_document(document: JsonValue, source: str, settings: Fields) -> SerializedDag:
    """Return the DAG of one serialized document.

    Raises:
        UsageError: it is none, or one of a version that is not read.
    """
    dag_id = _find_id(document, source)
    assert isinstance(document, dict)
    assert isinstance(document["dag"], dict)
    fields = _rename(document["dag"], _OLD_NAMES_OF_DAGS)
    version = document.get("__version")
    if isinstance(version, bool) or version not in VERSIONS:
        raise UsageError(
            f"DAG {dag_id!r} of {source} has version {clean(str(version))[:20]} of Airflow's serialization: versions "
            f"{', '.join(map(str, VERSIONS))} are read"
        )
    assert isinstance(version, int)
    if version == 1:  # leaves out what Airflow's setting says
        fields.setdefault("catchup", bool(settings.get("catchup", True)))
    tasks = fields.get("tasks")
    if not isinstance(tasks, list) or not all(isinstance(unwrap(each), dict) for each in tasks):
        raise UsageError(f"DAG {dag_id!r} of {source} has no list of tasks")
    if len(tasks) > MOST_TASKS:
        raise UsageError(f"DAG {dag_id!r} of {source} has {len(tasks):,} tasks: more than {MOST_TASKS:,} are not read")
    defaults = document.get("client_defaults")
    shared = unwrap(defaults.get("tasks")) if isinstance(defaults, dict) else None
    return SerializedDag(
        dag_id=dag_id,
        version=version,
        fields=fields,
        tasks=tuple(_read_task(each, shared if isinstance(shared, dict) else {}) for each in tasks),
        settings=settings,
    )


def _parse(text: bytes, source: str) -> JsonValue:
    try:
        value: JsonValue = json.loads(text)
    except RecursionError:
        raise UsageError(f"{source} has lists and objects that are too deep inside each other") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is no text in UTF-8: {error.reason}") from error
    except ValueError as error:
        raise UsageError(f"{source} is no JSON: {error}") from error
    return value


def _rename(fields: Mapping[str, JsonValue], names: Mapping[str, str]) -> dict[str, JsonValue]:
    return {names.get(name, name): each for name, each in fields.items()}


def _read_task(value: JsonValue, defaults: Fields) -> Fields:
    given = unwrap(value)
    assert isinstance(given, dict)
    fields = _rename(given, _OLD_NAMES_OF_TASKS)
    partial = unwrap(fields.get("partial_kwargs"))
    if isinstance(partial, dict):
        fields["partial_kwargs"] = _name_callbacks(_rename(partial, _OLD_NAMES_OF_TASKS))
    return {**defaults, **_name_callbacks(fields)}


def _name_callbacks(fields: dict[str, JsonValue]) -> dict[str, JsonValue]:
    for name in _OLD_CALLBACKS:
        if fields.pop(name, None):
            fields[f"has_{name}"] = True
    return fields


def _read_settings(value: JsonValue) -> Fields:
    """Return the settings that the script has written: durations and numbers, and nothing else."""
    if not isinstance(value, dict):
        return {}
    return {name: each for name, each in value.items() if each is None or read_seconds(each) is not None}
