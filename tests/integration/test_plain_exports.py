"""`export --as`: one plain file for Prefect or Airflow, which runs without this package."""

import ast
import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from pgflow_prefect.definitions.model import ChildRules, Dep, MapRules, StepRules, WorkflowDefinition
from pgflow_prefect.deployment.plain.export import PlainWish, export_plain
from pgflow_prefect.deployment.plain.source import NO_SOURCE
from pgflow_prefect.deployment.plain.write import Exported, Exporter, PlainSchedule, Target
from pgflow_prefect.errors import UsageError
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.engine import define

SHOP = '''
"""Handlers."""

from __future__ import annotations

import datetime

from pydantic import BaseModel

from pgflow_prefect import Branch, Skip, StepContext, Workflow

workflow = Workflow("shop", when_failed="continue", failed_by="leaves", tags=["sales"])
YEAR = datetime.date(2026, 1, 1).year


class Order(BaseModel):
    euros: float


def double(number: float) -> float:
    return 2 * number


@workflow.step(retries=2, retry_delay_seconds=[1, 10], timeout_seconds=60)
def fetch(payload: dict[str, list[float]]) -> list[Order]:
    return [Order(euros=each) for each in payload["euros"]]


@workflow.step
async def add_up(fetch: list[Order], context: StepContext) -> float:
    assert context.step_slug == "add_up"
    return sum(order.euros for order in fetch)


@workflow.step
def choose(add_up: float) -> Branch[str]:
    return Branch("celebrate" if add_up > 50 else "go-on", result="chosen")


@workflow.step
def celebrate(choose: str) -> str:
    return f"cake: {choose}"


@workflow.step("go-on")
def go_on() -> str:
    return "work"


@workflow.map(over="fetch")
def each(item: Order) -> float:
    return double(item.euros)


@workflow.step(rule="none_failed_min_one_success")
def report(add_up: float = 0, celebrate: str = "", go_on: str = "", each: list[float] = []) -> dict[str, object]:
    if add_up < 0:
        raise Skip("a bad day")
    return {"sum": add_up, "said": celebrate or go_on, "each": each, "year": YEAR}


flow = workflow.flow
'''
STEPS = {
    "fetch": [],
    "add_up": ["fetch"],
    "choose": ["add_up"],
    "celebrate": ["choose"],
    "go-on": ["choose"],
    "each": ["fetch"],
    "report": ["add_up", "celebrate", "go-on", "each"],
    "manual": [],
}


@pytest.fixture
def export(
    db: Connection, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Target, str], Exported]:
    """Export the shop, with this source of handlers, for a program."""
    define(db, "shop", STEPS)
    db.execute("UPDATE pgflow.steps SET rule = 'none_failed_min_one_success' WHERE slug = 'report'")
    db.execute("UPDATE pgflow.steps SET step_type = 'map', map_over = 'fetch' WHERE slug = 'each'")
    db.execute("UPDATE pgflow.workflows SET when_failed = 'continue', failed_by = 'leaves'")
    db.execute("SELECT pgflow_prefect.bind_step('shop', 'manual', 'external')")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flows").mkdir()

    def write(target: Target, source: str = SHOP, cron: str | None = None) -> Exported:
        (tmp_path / "flows" / "shop.py").write_text(dedent(source), "utf-8")
        settings = Settings(dsn=SecretStr(dsn))
        return asyncio.run(export_plain(settings, PlainWish("shop", target, cron=cron)))

    return write


def load(text: str, name: str) -> ModuleType:
    """Execute an exported file as a module."""
    module = ModuleType(name)
    sys.modules[name] = module
    try:
        exec(compile(text, f"{name}.py", "exec", dont_inherit=True), vars(module))  # noqa: S102  ours
    finally:
        del sys.modules[name]
    return module


def check_imports(text: str) -> None:
    """Check that a file does not import this package."""
    for node in ast.walk(ast.parse(text)):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [each for each in names if each.partition(".")[0] == "pgflow_prefect"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("euros", "said"), [([20, 35], "cake: chosen"), ([1], "work")], ids=["a branch", "the other branch"]
)
def test_the_file_for_prefect_runs_without_us_with_the_same_results(
    euros: list[float], said: str, export: Callable[..., Exported], prefect_api: str
) -> None:
    exported = export("prefect")
    check_imports(exported.text)
    module = load(exported.text, "exported_shop")
    module._STEPS[:] = [each for each in module._STEPS if each.slug != "manual"]
    found = module.exported_flow({"euros": euros})
    assert found == {"report": {"sum": sum(euros), "said": said, "each": [2 * each for each in euros], "year": 2026}}


def test_what_is_lost_is_named_at_the_top_and_to_the_caller(export: Callable[..., Exported]) -> None:
    exported = export("prefect")
    lost = "\n".join(exported.lost)
    assert "step 'manual': it is bound to external, and not to a function in Python" in lost
    assert "a schedule: none was found" in lost
    for each in exported.lost:
        assert f"# - {each}\n" in exported.text
    assert "a schedule" not in "\n".join(export("prefect", cron="0 6 * * *").lost)


class Recorded:
    """Stands for Airflow's SDK: keeps tasks, their options and edges."""

    def __init__(self) -> None:
        self.tasks: dict[str, Any] = {}
        self.edges: set[tuple[str, str]] = set()
        self.dag_options: dict[str, Any] = {}
        self.taken: list[str] = []

    def make_sdk(self) -> dict[str, ModuleType]:
        """Return the modules that an exported file imports."""
        task = self._decorate("task")
        task.branch = self._decorate("branch")
        sdk, exceptions, airflow = (ModuleType(name) for name in ("airflow.sdk", "airflow.sdk.exceptions", "airflow"))
        vars(sdk).update(dag=self._make_dag, task=task, CronTriggerTimetable=lambda *given, **named: (given, named))
        vars(exceptions).update(AirflowSkipException=type("AirflowSkipException", (Exception,), {}))
        return {"airflow": airflow, "airflow.sdk": sdk, "airflow.sdk.exceptions": exceptions}

    def _make_dag(self, **options: Any) -> Any:
        self.dag_options = options
        return lambda function: function

    def _decorate(self, kind: str) -> Any:
        def decorate(**options: Any) -> Any:
            def wrap(function: Any) -> Any:
                def make(**expanded: Any) -> Any:
                    made = Task(self, options["task_id"])
                    said = SimpleNamespace(kind=kind, function=function, expanded=expanded)
                    self.tasks[options["task_id"]] = (said, options)
                    return made

                make.expand = make  # type: ignore[attr-defined]
                return make

            return wrap

        return decorate


class Task:
    """A task of the stand-in."""

    def __init__(self, recorded: Recorded, task_id: str) -> None:
        self.recorded, self.task_id = recorded, task_id

    def __rshift__(self, other: "Task") -> "Task":
        self.recorded.edges.add((self.task_id, other.task_id))
        return other

    def as_setup(self) -> None:
        """Accept it."""


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The stand-in, as an exported file imports it: Airflow can't share our environment."""
    recorded = Recorded()
    for name, module in recorded.make_sdk().items():
        monkeypatch.setitem(sys.modules, name, module)
    return recorded


def test_the_file_for_airflow_has_the_same_edges_rules_and_options(
    export: Callable[..., Exported], airflow: Recorded
) -> None:
    exported = export("airflow", cron="0 6 * * *")
    check_imports(exported.text)
    load(exported.text, "exported_dag_file")
    assert airflow.edges == {(above, slug) for slug, upstream in STEPS.items() for above in upstream}
    assert airflow.tasks.keys() == STEPS.keys()
    options = {task_id: each for task_id, (_, each) in airflow.tasks.items()}
    assert options["report"]["trigger_rule"] == "none_failed_min_one_success"
    fetch = options["fetch"]
    assert (fetch["retries"], fetch["retry_delay"].total_seconds()) == (2, 1)
    assert fetch["execution_timeout"].total_seconds() == 60
    assert {task_id for task_id, (said, _) in airflow.tasks.items() if said.kind == "branch"} == {"choose"}
    assert airflow.tasks["each"][0].expanded["_item"].task_id == "fetch"
    assert (airflow.dag_options["dag_id"], airflow.dag_options["tags"]) == ("shop", ["sales"])
    assert airflow.dag_options["schedule"] == (("0 6 * * *",), {"timezone": "UTC"})


def test_a_task_of_the_airflow_file_gets_the_results_above_and_chooses_its_branches(
    export: Callable[..., Exported], airflow: Recorded
) -> None:
    load(export("airflow").text, "exported_dag_file")
    xcoms: dict[tuple[str, str], Any] = {("add_up", "return_value"): 55.0, ("each", "return_value"): 2.0}
    ti = SimpleNamespace(
        try_number=1, map_index=-1,
        xcom_pull=lambda task_ids, key="return_value": pull(xcoms, task_ids, key),
        xcom_push=lambda key, value: xcoms.__setitem__(("choose", key), value),
    )  # fmt: skip
    context = {"ti": ti, "dag_run": SimpleNamespace(conf={"euros": [20, 35]}, run_id="run 1")}
    execute = {task_id: said.function for task_id, (said, _) in airflow.tasks.items()}
    assert execute["fetch"](**context) == [{"euros": 20.0}, {"euros": 35.0}]
    assert execute["choose"](**context) == ["celebrate"]
    assert execute["celebrate"](**context) == "cake: chosen"
    assert execute["each"](_item={"euros": 4}, **context) == 8
    with pytest.raises(NotImplementedError, match="step 'manual'"):
        execute["manual"](**context)
    xcoms["add_up", "return_value"] = -1.0
    with pytest.raises(Exception, match="a bad day"):
        execute["report"](**context)


def pull(xcoms: dict[tuple[str, str], Any], task_ids: str | list[str], key: str) -> Any:
    """Return XComs as Airflow does: a list where the ids are one. Here each task has at most one."""
    if isinstance(task_ids, str):
        return xcoms.get((task_ids, key))
    return [xcoms.get((each, key)) for each in task_ids]


EVIL = ["'); __import__('os').abort() #", '"""\n__import__("os").abort()\n"""', "a\nraise SystemExit", "\\", "a/b%c"]


@pytest.mark.parametrize("slug", EVIL)
@pytest.mark.parametrize("target", ["airflow", "prefect"])
def test_slugs_of_rows_are_never_code(slug: str, target: Target, airflow: Recorded) -> None:
    rules = {slug: StepRules(child=ChildRules(workflow=slug)), "last": StepRules(map=MapRules(over=slug))}
    definition = WorkflowDefinition(slug=slug, steps=(slug, "last"), deps=(Dep(slug, "last"),), rules=rules)
    exported = Exporter(definition, {}, {slug: slug, "last": slug}, NO_SOURCE, [slug], PlainSchedule(slug, slug)).write(
        target
    )
    calls = {ast.unparse(node) for node in ast.walk(ast.parse(exported.text)) if isinstance(node, ast.Name | ast.Raise)}
    assert not calls & {"__import__", "SystemExit", "raise SystemExit"}
    comments = exported.text.partition("\nfrom __future__")[0]
    assert all(line.startswith("#") or not line for line in comments.splitlines())
    load(exported.text, "exported_dag_file")
    assert target == "prefect" or len(airflow.tasks) == 2


def test_a_name_that_the_file_needs_itself_is_refused(export: Callable[..., Exported]) -> None:
    with pytest.raises(UsageError, match="has the name '_call_handler', which the exported file needs"):
        export(
            "prefect", SHOP.replace("def double(", "def _call_handler(").replace("double(item", "_call_handler(item")
        )


def test_other_statements_on_the_workflow_are_left_out_by_name(export: Callable[..., Exported]) -> None:
    exported = export("prefect", SHOP.replace("flow = workflow.flow", "print(workflow.slug)\nflow = workflow.flow"))
    assert any("is left out: print(workflow.slug)" in each for each in exported.lost)


def test_a_handler_of_another_module_is_imported_by_name(export: Callable[..., Exported], tmp_path: Path) -> None:
    (tmp_path / "flows" / "work_of_others.py").write_text("def by_hand() -> int:\n    return 1\n", "utf-8")
    more = 'from flows.work_of_others import by_hand\nworkflow.step("manual")(by_hand)\nflow = workflow.flow'
    exported = export("prefect", SHOP.replace("flow = workflow.flow", more))
    assert "from flows.work_of_others import by_hand" in exported.text
    assert any(
        "line" in each and 'workflow.step("manual")(by_hand)' in each.replace("'", '"') for each in exported.lost
    )
