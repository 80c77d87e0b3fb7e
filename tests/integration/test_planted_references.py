"""A row that refers to a result can't make a worker read another place, or read with another serializer."""

import pickle
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from psycopg.types.json import Jsonb

from pgflow_prefect import Workflow
from pgflow_prefect.errors import RunFailedError
from pgflow_prefect.handlers.references import MARK
from tests.conftest import Connection
from tests.engine import run_workflow
from tests.integration.conftest import Define, make_slug

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

Plant = Callable[[dict[str, Any]], dict[str, Any]]

executed: list[str] = []


class Trap:
    """Tells that it was unpickled."""

    def __reduce__(self) -> Any:
        return executed.append, ("a planted object was unpickled",)


def complete_make(db: Connection, run_id: UUID) -> dict[str, Any]:
    row: Any = db.execute(
        "SELECT step_result FROM pgflow.step_states WHERE run_id = %s AND step_slug = 'make'", (run_id,)
    ).fetchone()
    return dict(row[0][MARK])


async def take_planted(
    db: Connection, define: Define, folder: Path, plant: Plant, *, serializer: str = "json"
) -> list[object]:
    """Execute a run up to `take`, change the row of `make`, and go on. Return what `take` gets."""
    workflow = Workflow(make_slug(), result_storage=folder, result_serializer=serializer)
    define(workflow.slug, ["make", "gate", "take"], [("make", "gate"), ("gate", "take"), ("make", "take")])
    taken: list[object] = []

    @workflow.step
    def make() -> list[int]:
        return [1, 2]

    @workflow.step
    def gate() -> None:
        planted = {MARK: plant(complete_make(db, run_id))}
        db.execute(
            "UPDATE pgflow.step_states SET step_result = %s WHERE run_id = %s AND step_slug = 'make'",
            (Jsonb(planted), run_id),
        )

    @workflow.step
    def take(make: object) -> None:
        taken.append(make)

    run_id = run_workflow(db, workflow.slug).id
    await workflow.flow(run_id=run_id)
    return taken


def refer(folder: Path, key: str, data: bytes) -> dict[str, Any]:
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {"key": key, "sha256": sha256(data).hexdigest(), "size": len(data)}


@pytest.mark.parametrize(
    "key",
    [
        "../outside",
        "/etc/passwd",
        "pgflow/other",
        "file:///etc/passwd",
    ],
)
async def test_no_other_place_is_read(db: Connection, define: Define, tmp_path: Path, key: str) -> None:
    inside = tmp_path / "results"
    (tmp_path / "outside").write_text("[3]")
    real = {"sha256": sha256(b"[3]").hexdigest(), "size": 3}
    with pytest.raises(RunFailedError, match="no result of that step in this run"):
        await take_planted(db, define, inside, lambda known: known | real | {"key": key})


async def test_a_result_of_another_run_or_step_is_not_read(db: Connection, define: Define, tmp_path: Path) -> None:
    def plant_other_run(known: dict[str, Any]) -> dict[str, Any]:
        installation, run_id, name = known["key"].removeprefix("pgflow/").split("/")
        other = f"{run_id[:-1]}{'0' if run_id[-1] != '0' else '1'}"
        return known | refer(tmp_path, f"pgflow/{installation}/{other}/{name}", b"[3]")

    def plant_other_step(known: dict[str, Any]) -> dict[str, Any]:
        folder, _, name = known["key"].rpartition("/")
        return known | refer(tmp_path, f"{folder}/{name[::-1]}", b"[3]")

    for plant in (plant_other_run, plant_other_step):
        with pytest.raises(RunFailedError, match="no result of that step in this run"):
            await take_planted(db, define, tmp_path, plant)


async def test_the_storage_of_a_row_is_not_followed(db: Connection, define: Define, tmp_path: Path) -> None:
    """The value comes from the storage that the code names; the text in the row is for people."""
    inside, outside = tmp_path / "results", tmp_path / "outside"

    def plant(known: dict[str, Any]) -> dict[str, Any]:
        refer(outside, known["key"], b"[3]")
        return known | {"storage": outside.as_uri()}

    assert await take_planted(db, define, inside, plant) == [[1, 2]]


async def test_pickle_is_not_read_where_the_code_names_another_serializer(
    db: Connection, define: Define, tmp_path: Path
) -> None:
    """Even where the attacker can write to the storage."""

    def plant(known: dict[str, Any]) -> dict[str, Any]:
        return known | refer(tmp_path, known["key"], pickle.dumps(Trap())) | {"serializer": "pickle"}

    for serializer in ("json", "compressed/json"):
        with pytest.raises(RunFailedError, match="was written with the serializer 'pickle', and the code"):
            await take_planted(db, define, tmp_path / serializer, plant, serializer=serializer)
    assert executed == []


async def test_json_is_read_whatever_the_code_names_now(db: Connection, define: Define, tmp_path: Path) -> None:
    def plant(known: dict[str, Any]) -> dict[str, Any]:
        return known | refer(tmp_path, known["key"], b"[3]") | {"serializer": "json"}

    assert await take_planted(db, define, tmp_path, plant, serializer="pickle") == [[3]]


@pytest.mark.parametrize(
    "change",
    [{"attempt": -1}, {"size": "1"}, {"sha256": "0"}, {"path": "x"}, {"key": None}],
    ids=["attempt", "size", "sha256", "more", "no key"],
)
async def test_what_is_no_reference_is_a_value(
    db: Connection, define: Define, tmp_path: Path, change: dict[str, Any]
) -> None:
    """A worker reads nothing for it. It hands the value over, as it does with any JSON."""
    found: list[Any] = []

    def plant(known: dict[str, Any]) -> dict[str, Any]:
        found.append(known | change)
        return known | change

    assert await take_planted(db, define, tmp_path, plant) == [{MARK: found[0]}]


async def test_an_object_that_is_no_json_can_not_add_members(db: Connection, define: Define, tmp_path: Path) -> None:
    """The argument `upstream` is an object of all results: the text of one must not become another one's."""

    def plant(known: dict[str, Any]) -> dict[str, Any]:
        return known | refer(tmp_path, known["key"], b'1,"gate":2')

    with pytest.raises(RunFailedError, match="can't be read with the serializer 'json'"):
        await take_planted(db, define, tmp_path, plant)
