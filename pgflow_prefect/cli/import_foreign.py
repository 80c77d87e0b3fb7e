"""`import --from`: workflows that are defined elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pgflow_prefect.cli.console import out, print_json
from pgflow_prefect.errors import InvalidDefinitionError, UnknownWorkflowError, UsageError

if TYPE_CHECKING:
    from datetime import datetime

    from pgflow_prefect.airflow.whole_runs import History
    from pgflow_prefect.definitions.airflow.dag import AirflowDag
    from pgflow_prefect.definitions.airflow.document import DagFile, SerializedDag
    from pgflow_prefect.definitions.model import WorkflowDefinition
    from pgflow_prefect.deployment.code_generation import ImportReport
    from pgflow_prefect.deployment.foreign import ForeignImport, ForeignWorkflow
    from pgflow_prefect.settings import Settings


@dataclass(frozen=True)
class Source:
    """What is to be imported, and from where; as typed.

    Attributes:
        kind: the program that defines it.
        names: DAGs, or files of dbt.
        every: all DAGs.
        airflow_dsn: Airflow's database.
        json_file: a file of DAGs.
        history: since when past runs are imported; None for no runs.
    """

    kind: Literal["airflow", "dbt"] | None
    names: Collection[str]
    every: bool
    airflow_dsn: str | None
    json_file: Path | None
    history: str | None = None


def import_foreign(settings: Settings, source: Source, directory: Path | None, *, as_json: bool) -> None:
    """Write workflows that are defined elsewhere into the database, and their stubs and ledgers into files.

    Everything is read and checked before anything is written.

    Raises:
        UsageError: something can't be read, or does not fit what is there.
        PgflowPrefectError: a database can't be reached.
    """
    import anyio

    from pgflow_prefect.deployment.handler_files import DIRECTORY

    if source.kind is None:
        raise UsageError("--airflow-dsn, --json-file and --history go with --from airflow")
    since = _read_history(source)
    found = _read_dbt(source) if source.kind == "dbt" else anyio.run(_read_airflow, settings, source)
    plans = anyio.run(_import, settings, found, directory or DIRECTORY)
    histories = {}
    if since is not None:
        histories = anyio.run(_import_histories, settings, source, found, since)
        plans = [plan.add_lines(histories[plan.addition.definition.slug].make_lines()) for plan in plans]
    done = [(plan, plan.write_files()) for plan in plans]
    if as_json:
        print_json([_to_json(plan, report, histories) for plan, report in done])
        return
    for workflow, (plan, report) in zip(found, done, strict=True):
        _print(workflow.source, plan, report)
        if (history := histories.get(plan.addition.definition.slug)) is not None:
            _print_history(history)


def _read_history(source: Source) -> datetime | None:
    """Return since when past runs are imported; None where none are."""
    from pgflow_prefect.cli.runs import read_since

    if source.history is None:
        return None
    if source.kind != "airflow" or source.json_file is not None:
        raise UsageError("--history reads Airflow's database: it goes with --from airflow and --airflow-dsn")
    return read_since(source.history, "--history")


async def _import_histories(
    settings: Settings, source: Source, found: list[ForeignWorkflow], since: datetime
) -> dict[str, History]:
    """Write the past runs of DAGs, and return what was found of each."""
    from pgflow_prefect.airflow.whole_runs import import_history
    from pgflow_prefect.database.airflow.reader import open_airflow
    from pgflow_prefect.database.store import open_store

    secret = settings.airflow_dsn.get_secret_value() if settings.airflow_dsn is not None else None
    async with (
        open_store(settings, size=1) as store,
        open_airflow(source.airflow_dsn or secret or "", timeout=settings.connect_timeout) as airflow,
    ):
        slugs = [workflow.definition.slug for workflow in found]
        with_results = settings.airflow_results
        return {slug: await import_history(store, airflow, slug, since, with_results=with_results) for slug in slugs}


def _print_history(history: History) -> None:
    out.print(f"past runs of {history.dag_id!r}: {history.runs} found, {history.written} written", markup=False)
    for task_id, task in sorted(history.gone.items()):
        out.print(
            f"  task {task_id!r} is in {task.runs} of them, and not in the present DAG: see the ledger", markup=False
        )
    for run_id, reason in history.failures.items():
        out.print(f"  run {run_id!r} was not written: {reason}", markup=False)


async def _read_airflow(settings: Settings, source: Source) -> list[ForeignWorkflow]:
    from pgflow_prefect.airflow.ledger import make_ledger
    from pgflow_prefect.airflow.stubs import make_origin
    from pgflow_prefect.deployment.foreign import ForeignWorkflow

    dags = await _read_dags(settings, source)
    return [ForeignWorkflow(dag.definition, make_origin(dag), make_ledger(dag), "Airflow") for dag in dags]


async def read_one_dag(settings: Settings, dag_id: str, airflow_dsn: str | None, json_file: Path | None) -> AirflowDag:
    """Return a DAG, as Airflow's scheduler knows it.

    Args:
        settings: name Airflow's database, where nothing else does.
        dag_id: the DAG, and the workflow.
        airflow_dsn: Airflow's database.
        json_file: a file of DAGs.

    Raises:
        UsageError: no place is named, or it has no such DAG.
        DatabaseUnavailableError: Airflow's database can't be reached.
    """
    [dag] = await _read_dags(settings, Source("airflow", [dag_id], False, airflow_dsn, json_file))
    return dag


async def _read_dags(settings: Settings, source: Source) -> list[AirflowDag]:
    from pgflow_prefect.definitions.airflow.dag import read_dag

    secret = settings.airflow_dsn.get_secret_value() if settings.airflow_dsn is not None else None
    if source.json_file is not None and source.airflow_dsn is not None:
        raise UsageError("--json and --airflow-dsn exclude each other: name one")
    dsn = source.airflow_dsn or secret
    if source.json_file is None and not dsn:
        raise UsageError(
            "where are the DAGs? give Airflow's database as --airflow-dsn, or a file as --json FILE, which the script "
            "of `pgflow-prefect airflow dump` writes"
        )
    if source.json_file is not None:
        documents = _read_file(source, source.json_file)
    else:
        assert dsn
        documents = await _read_database(source, dsn, settings.connect_timeout)
    return [read_dag(each) for each in documents]


def _read_file(source: Source, path: Path) -> list[SerializedDag]:
    from pgflow_prefect.definitions.airflow.document import MOST_BYTES, open_file

    name = "standard input" if str(path) == "-" else str(path)
    file = open_file(_read_bytes(path, name, MOST_BYTES), name)
    return [file.read(dag_id) for dag_id in _choose(source, file)]


def _choose(source: Source, file: DagFile) -> list[str]:
    known = list(file.documents)
    if source.every or (not source.names and len(known) == 1):
        return known
    if not source.names:
        raise UsageError(f"which DAG? name it, or say --all: {file.source} has {_list(known)}")
    _check_known(source.names, known, file.source)
    return list(dict.fromkeys(source.names))


async def _read_database(source: Source, dsn: str, timeout: float) -> list[SerializedDag]:  # noqa: ASYNC109  libpq's
    from pgflow_prefect.database.airflow.reader import open_airflow
    from pgflow_prefect.definitions.airflow.document import MOST_BYTES, read_row

    if not source.names and not source.every:
        raise UsageError("which DAG? name it, or say --all")
    async with open_airflow(dsn, timeout=timeout) as database:
        known = await database.list_dags()
        wanted = known if source.every else list(dict.fromkeys(source.names))
        _check_known(wanted, known, "Airflow's database")
        documents = []
        for dag_id in wanted:  # one by one: each may be big
            row = (await database.load_dags([dag_id], MOST_BYTES)).get(dag_id)
            if row is None:
                raise UsageError(f"Airflow has removed the DAG {dag_id!r} in the meantime")
            documents.append(
                read_row(dag_id, row.data, row.compressed, f"Airflow's row of DAG {dag_id!r} ({row.size:,} bytes)")
            )
    return documents


def _check_known(names: Iterable[str], known: Collection[str], where: str) -> None:
    from pgflow_prefect.wording import suggest

    there = set(known)
    for name in names:
        if name not in there:
            hint = suggest(name, known) or f": it has {_list(list(known))}"
            raise UsageError(f"{where} has no DAG {name!r}{hint}")


def _list(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:10]))
    return (f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown) or "none"  # noqa: PLR2004  ten are shown


def _read_dbt(source: Source) -> list[ForeignWorkflow]:
    from pgflow_prefect.definitions.dbt import MOST_BYTES, read_manifest
    from pgflow_prefect.deployment.foreign import ForeignWorkflow

    if source.airflow_dsn is not None or source.json_file is not None or source.every:
        raise UsageError("--from dbt takes the file only: import --from dbt target/manifest.json")
    if not source.names:
        raise UsageError("which manifest? name it: import --from dbt target/manifest.json")
    projects = [read_manifest(_read_bytes(Path(name), name, MOST_BYTES), name) for name in source.names]
    return [ForeignWorkflow(each.definition, each.origin, each.ledger, "dbt") for each in projects]


def _read_bytes(path: Path, name: str, most: int) -> bytes:
    try:
        if name == "standard input":
            text = sys.stdin.buffer.read(most + 1)
        else:
            with path.open("rb") as file:
                text = file.read(most + 1)
    except OSError as error:
        raise UsageError(f"{name} can't be read: {error.strerror}") from error
    return text


async def _import(settings: Settings, found: list[ForeignWorkflow], directory: Path) -> list[ForeignImport]:
    """Write the definitions into the database, and return what is to be written into files."""
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        plans = []
        for workflow in found:
            old = None
            with suppress(UnknownWorkflowError):
                old = await store.load_definition(workflow.definition.slug)
            plans.append(_plan(workflow, old, directory))
        _check_paths(plans)
        for plan in plans:
            await store.replace_definition(plan.old, plan.addition.definition)
    return plans


def _plan(workflow: ForeignWorkflow, old: WorkflowDefinition | None, directory: Path) -> ForeignImport:
    from pgflow_prefect.definitions.addition import add_definition
    from pgflow_prefect.definitions.graph import find_problems
    from pgflow_prefect.deployment.foreign import plan_foreign
    from pgflow_prefect.deployment.handler_files import default_path, refuse_shadowing

    slug = workflow.definition.slug
    if old is not None and old.steps and not {*old.steps} & {*workflow.definition.steps}:
        raise UsageError(
            f"the database has a workflow {slug!r} with none of the steps that it has in {workflow.source}, so it is "
            "another one: nothing was written. Import into another database (--dsn), or rename one of them"
        )
    addition = add_definition(old, workflow.definition, workflow.source)
    if problems := find_problems(addition.definition):
        raise InvalidDefinitionError(slug, problems)
    path = default_path(slug, directory)
    refuse_shadowing(slug, path)
    return plan_foreign(workflow, old, addition, path)


def _check_paths(plans: list[ForeignImport]) -> None:
    seen: dict[Path, str] = {}
    for plan in plans:
        slug, path = plan.addition.definition.slug, plan.stubs.report.path
        if path in seen:
            raise UsageError(
                f"{path} would have the handlers of {seen[path]!r} and {slug!r}: import each into its own --directory"
            )
        seen[path] = slug


def _print(source: str, plan: ForeignImport, report: ImportReport) -> None:
    addition, slug = plan.addition, plan.addition.definition.slug
    if plan.old is None:
        size = f"{len(addition.steps)} steps, {len(addition.deps)} dependencies"
        out.print(f"wrote workflow {slug!r} into the database: {size}", markup=False)
    elif addition.steps or addition.deps:
        added = [*map(repr, addition.steps), *(f"{dep.upstream!r} -> {dep.downstream!r}" for dep in addition.deps)]
        out.print(f"added to workflow {slug!r} in the database: {', '.join(added)}", markup=False)
    else:
        out.print(f"workflow {slug!r} in the database has every step: nothing added", markup=False)
    for each in addition.kept:
        out.print(f"left as it is: {each}", markup=False)
    if report.created:
        out.print(f"wrote {report.path}: {len(report.added)} stubs to fill in", markup=False)
    elif report.added:
        out.print(f"added to {report.path}: {', '.join(report.added)}", markup=False)
    else:
        out.print(f"{report.path} has a handler for every step: nothing added", markup=False)
    if report.gone:
        out.print(f"in {report.path}, but not in the database: {', '.join(report.gone)}", markup=False)
    _print_ledger(source, plan)


def _print_ledger(source: str, plan: ForeignImport) -> None:
    ledger = plan.ledger
    open_ = sum(not line.is_done for line in ledger.added)
    if ledger.added:
        out.print(
            f"wrote {plan.ledger_path}: {len(ledger.added)} lines, of which {open_} are for you to deal with",
            markup=False,
        )
    else:
        out.print(f"{plan.ledger_path} has every line: nothing added", markup=False)
    if ledger.gone:
        out.print(f"lines of {plan.ledger_path} that {source} no longer says:", markup=False)
        for text in ledger.gone:
            out.print(f"  {text}", markup=False)


def _to_json(plan: ForeignImport, report: ImportReport, histories: dict[str, History]) -> dict[str, object]:
    history = histories.get(plan.addition.definition.slug)
    past = (
        {}
        if history is None
        else {
            "past_runs": history.runs,
            "past_runs_written": history.written,
            "past_tasks": sorted(history.gone),
            "past_runs_failed": history.failures,
        }
    )
    return {
        **past,
        "workflow": plan.addition.definition.slug,
        "new": plan.old is None,
        "steps_added": list(plan.addition.steps),
        "deps_added": [list(dep) for dep in plan.addition.deps],
        "kept": list(plan.addition.kept),
        **vars(report),
        "path": str(report.path),
        "ledger": str(plan.ledger_path),
        "ledger_added": [line.text for line in plan.ledger.added],
        "ledger_gone": list(plan.ledger.gone),
    }
