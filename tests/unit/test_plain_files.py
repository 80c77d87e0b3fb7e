"""What the files of `export --as` do: they are executed, with stand-ins for the tasks of Prefect and Airflow."""

import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from textwrap import dedent
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule

from pgflow_prefect.deployment.handler_files import load_workflow
from pgflow_prefect.deployment.plain.export import choose_schedule
from pgflow_prefect.deployment.plain.source import read_source
from pgflow_prefect.deployment.plain.write import Exported, Exporter, PlainSchedule, Target
from pgflow_prefect.errors import UsageError

TOP = "from pgflow_prefect import Branch, Skip, StepContext, Workflow\n\nworkflow = Workflow('shop')\n"

Write = Callable[..., Exported]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Export the workflow of a source for a program."""
    monkeypatch.chdir(tmp_path)
    written: list[Path] = []

    def export(source: str, target: Target = "prefect", *, top: str = TOP, slug: str = "shop") -> Exported:
        path = tmp_path / f"handlers_{len(written)}.py"
        written.append(path)
        path.write_text(top + dedent(source), "utf-8")
        workflow, _ = load_workflow(slug, str(path))
        read = read_source(path, workflow.handlers)
        definition, schedule = workflow.definition, PlainSchedule("0 6 * * *", "UTC")
        return Exporter(definition, workflow.step_handlers, {}, read, workflow.tags, schedule).write(target)

    return export


class Now:
    """Stands for a task of Prefect: executes its function when it is submitted."""

    def __init__(self, task: Any, keep: "list[Now] | None" = None) -> None:
        self.task, self.keep, self.callbacks = task, keep, 0

    def submit(self, given: dict[str, Any], wait_for: list[Any]) -> "Ended":
        """Execute it."""
        assert self.keep is not None
        self.keep.append(self)
        try:
            return Ended(self, self.task.fn(given))
        except Exception as error:  # noqa: BLE001  as Prefect does
            return Ended(self, error)


class Ended:
    """Stands for a future of Prefect whose task has ended."""

    def __init__(self, task: Now, found: Any) -> None:
        self.task, self.found = task, found

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call it."""
        self.task.callbacks += 1
        callback(self)

    def result(self, *, raise_on_failure: bool) -> Any:
        """Return the result or the error."""
        assert not raise_on_failure
        return self.found


def load(exported: Exported) -> ModuleType:
    """Execute a file as the module that a program imports."""
    module = ModuleType("exported_file")
    sys.modules["exported_file"] = module
    try:
        exec(compile(exported.text, "exported_file.py", "exec", dont_inherit=True), vars(module))  # noqa: S102  ours
    finally:
        del sys.modules["exported_file"]
    return module


def run(exported: Exported, payload: Any = None, begun: list[Now] | None = None) -> dict[str, Any]:
    """Execute the flow of a file for Prefect."""
    module = load(exported)
    begun = begun if begun is not None else []
    module._STEPS[:] = [replace(each, task=Now(each.task, begun)) for each in module._STEPS]
    [flow] = [each for name, each in vars(module).items() if name.startswith("exported_flow") and hasattr(each, "fn")]
    found: dict[str, Any] = flow.fn(payload)
    return found


class Skipped(Exception):  # noqa: N818  as in Airflow
    """Stands for AirflowSkipException."""


class Airflow:
    """Stands for Airflow's SDK and its XComs, with the lists that it makes of them."""

    def __init__(self) -> None:
        self.functions: dict[str, Callable[..., Any]] = {}
        self.options: dict[str, dict[str, Any]] = {}
        self.expanded: dict[str, str] = {}
        self.xcoms: dict[tuple[str, str], list[Any]] = {}

    def make(self, **options: Any) -> Any:
        """Stand for `task` and `task.branch`."""
        task_id = options["task_id"]

        def decorate(function: Callable[..., Any]) -> Any:
            self.functions[task_id], self.options[task_id] = function, options
            return Made(self, task_id)

        return decorate

    def pull(self, task_ids: str | list[str], key: str = "return_value") -> Any:
        """Return XComs as `xcom_pull` of Airflow 3 does without `map_indexes`."""
        found: list[Any] = []
        for each in [task_ids] if isinstance(task_ids, str) else task_ids:
            values = self.xcoms.get((each, key))
            found.extend([None] if values is None else values)
        return found[0] if isinstance(task_ids, str) and len(found) == 1 else found

    def execute(self, task_id: str, *items: Any, run_id: str = "run", **run: Any) -> Any:
        """Execute a task, or one for each item, and keep what it returns."""
        found = []
        for index, item in enumerate(items) if items else [(None, None)]:
            ti = SimpleNamespace(try_number=1, map_index=index, xcom_pull=self.pull, xcom_push=self._push(task_id))
            context = {"ti": ti, "dag_run": SimpleNamespace(conf={}, run_id=run_id, **run)}
            found.append(self.functions[task_id](**context, **({"_item": item} if items else {})))
        self.xcoms[task_id, "return_value"] = [each for each in found if each is not None] or None  # type: ignore[assignment]
        return found if items else found[0]

    def _push(self, task_id: str) -> Callable[..., None]:
        return lambda key, value: self.xcoms.__setitem__((task_id, key), [value])


class Made:
    """Stands for a decorated task and for its place in a DAG."""

    def __init__(self, airflow: Airflow, task_id: str) -> None:
        self.airflow, self.task_id = airflow, task_id

    def __call__(self) -> "Made":
        return self

    def expand(self, _item: "Made") -> "Made":
        """Map over a result."""
        self.airflow.expanded[self.task_id] = _item.task_id
        return self

    def __rshift__(self, other: "Made") -> "Made":
        return other


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> Airflow:
    """The stand-in, as a file imports it."""
    made = Airflow()
    parent, sdk, exceptions = (ModuleType(name) for name in ("airflow", "airflow.sdk", "airflow.sdk.exceptions"))

    def task(**options: Any) -> Any:
        return made.make(**options)

    task.branch = task  # type: ignore[attr-defined]
    vars(sdk).update(dag=lambda **_: lambda function: function, task=task, CronTriggerTimetable=lambda *_, **__: None)
    vars(exceptions).update(AirflowSkipException=Skipped)
    for module in (parent, sdk, exceptions):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


CHARGE = """
@workflow.step
def orders(payload: dict) -> list[int]:
    return payload.get("orders", [8])


@workflow.map(over="orders", at_once=2)
def charge(item: int, context) -> dict:
    return {"key": context.idempotency_key, "index": context.item_index, "all": list(context.item_indexes)}


@workflow.step
def total(charge: list[dict]) -> list[dict]:
    return charge
"""


def test_each_item_of_a_map_has_an_idempotency_key_of_its_own_in_prefect(write: Write) -> None:
    found = run(write(CHARGE), {"orders": [7, 7, 7]})["total"]
    assert [each["key"] for each in found] == ["shop/.0/charge", "shop/.1/charge", "shop/.2/charge"]
    assert [(each["index"], each["all"]) for each in found] == [(0, [0]), (1, [1]), (2, [2])]


def test_each_item_of_a_map_has_an_idempotency_key_of_its_own_in_airflow(write: Write, airflow: Airflow) -> None:
    load(write(CHARGE, "airflow"))
    found = airflow.execute("charge", 7, 7, run_id="scheduled__2026")
    assert [each["key"] for each in found] == ["shop/scheduled__2026.0/charge", "shop/scheduled__2026.1/charge"]
    assert airflow.options["charge"]["max_active_tis_per_dagrun"] == 2


def test_dags_whose_runs_have_one_id_share_no_key(write: Write, airflow: Airflow) -> None:
    keys = set()
    for slug in ("shop", "shop/a", "shop%2Fa"):
        work = "@workflow.step\ndef pay(context):\n    return context.idempotency_key\n"
        load(write(work, "airflow", top=TOP.replace("'shop'", repr(slug)), slug=slug))
        keys.add(airflow.execute("pay"))
    assert len(keys) == 3


def test_a_map_with_one_item_gives_a_list_in_airflow(write: Write, airflow: Airflow) -> None:
    load(write(CHARGE, "airflow"))
    airflow.execute("charge", 8)
    assert len(airflow.execute("total")) == 1
    assert airflow.expanded == {"charge": "orders"}


CONDITIONS = """
@workflow.step
def order() -> dict:
    return {"refund": False}


@workflow.step(only_if={"order": {"refund": True}})
def refund(order: dict) -> str:
    return "money"


@workflow.step(unless={"order": {"refund": True}})
def send(order: dict) -> str:
    return "goods"
"""


@pytest.mark.parametrize("target", ["prefect", "airflow"])
def test_a_step_with_a_condition_fails_and_is_named(write: Write, airflow: Airflow, target: Target) -> None:
    exported = write(CONDITIONS, target)
    for slug in ("refund", "send"):
        said = f"step {slug!r}: its condition (only_if, unless) is not in this file"
        assert any(each.startswith(said) for each in exported.lost)
        assert f"# - {said}" in exported.text
    if target == "prefect":
        with pytest.raises(RuntimeError, match="has failed") as raised:
            run(exported)
        assert isinstance(raised.value.__cause__, NotImplementedError)
    else:
        load(exported)
        with pytest.raises(NotImplementedError, match="its condition"):
            airflow.execute("refund")


BRANCHES = """
def pick(which: str) -> Branch:
    return Branch(which, whole=True)


@workflow.step
def look(payload) -> Branch:
    return pick("full") if payload != {"delta": 1} else Branch("delta")


@workflow.step
def full(look: str | None) -> str:
    return f"full {look}"


@workflow.step
def delta(look: str | None) -> str:
    return f"delta {look}"


@workflow.step(rule="all_done")
def clean(delta: str = "") -> str:
    return "cleaned"


@workflow.step(rule="none_failed")
def publish(full: str = "", delta: str = "") -> str:
    return full or delta
"""


def test_a_branch_without_a_result_gives_none_in_airflow(write: Write, airflow: Airflow) -> None:
    load(write(BRANCHES.replace("whole=True", ""), "airflow"))
    assert airflow.execute("look") == ["full"]
    assert airflow.execute("full") == "full None"
    assert airflow.execute("publish") == "full None"


def test_a_whole_branch_skips_all_below_the_others_in_prefect(write: Write) -> None:
    assert run(write(BRANCHES)) == {"publish": "full None"}
    assert run(write(BRANCHES), {"delta": 1}) == {"publish": "delta None", "clean": "cleaned"}


def test_a_whole_branch_fails_in_airflow_where_a_rule_would_execute_a_step(write: Write, airflow: Airflow) -> None:
    exported = write(BRANCHES, "airflow")
    assert any("Branch(whole=True)" in each for each in exported.lost)
    load(exported)
    with pytest.raises(NotImplementedError, match="'clean'"):
        airflow.execute("look")
    load(write(BRANCHES.replace('rule="all_done"', ""), "airflow"))
    assert airflow.execute("look") == ["full"]


FAILURES = """
@workflow.step
def work() -> int:
    raise ValueError("no disk")


@workflow.step(rule="all_done", after=["work"], fails_run=False)
def tell(context: StepContext) -> list:
    return [[each.slug, each.message] for each in context.failed_steps]


@workflow.step(fails_run=False, rule="all_done", after=["tell"])
def look(context: StepContext) -> str:
    return str(context.logical_date)
"""


def test_a_step_after_a_failure_gets_the_failed_steps_in_prefect(write: Write) -> None:
    exported = write(
        FAILURES.replace("def look(", "def look(tell, ").replace("str(context.log", "tell or str(context.log")
    )
    module = load(exported)
    begun: list[Now] = []
    module._STEPS[:] = [replace(each, task=Now(each.task, begun), fails_run=False) for each in module._STEPS]
    assert module.exported_flow.fn(None) == {"look": [["work", "no disk"]]}
    assert any("context.logical_date: always None" in each for each in exported.lost)


def test_the_failed_steps_are_named_as_lost_in_airflow_and_never_empty(write: Write, airflow: Airflow) -> None:
    exported = write(FAILURES, "airflow")
    assert any("context.failed_steps" in each for each in exported.lost)
    load(exported)
    with pytest.raises(RuntimeError, match="failed_steps is not known"):
        airflow.execute("tell")


def test_an_interval_without_a_length_is_none_in_airflow(write: Write, airflow: Airflow) -> None:
    exported = write("@workflow.step\ndef look(context):\n    return context.data_interval_start\n", "airflow")
    assert any("context.data_interval_start" in each for each in exported.lost)
    load(exported)
    assert airflow.execute("look", data_interval_start=5, data_interval_end=5) is None
    assert airflow.execute("look", data_interval_start=4, data_interval_end=5) == 4


def test_what_schedules_lose_is_named() -> None:
    interval, rule = IntervalSchedule(interval=timedelta(hours=1)), RRuleSchedule(rrule="FREQ=DAILY")
    cron = DeploymentSchedule(schedule=CronSchedule(cron="0 6 * * *"), active=True, parameters={"schedule": "x"})
    second = DeploymentSchedule(schedule=CronSchedule(cron="0 7 * * *"), active=True)
    chosen, lost = choose_schedule([cron, second, DeploymentSchedule(schedule=interval, active=True)])
    assert chosen == PlainSchedule("0 6 * * *", "UTC")
    assert len(lost) == 3
    assert "payload" in lost[0]
    assert "0 7 * * *" in lost[1]
    assert "1:00:00" in lost[2]
    chosen, lost = choose_schedule([DeploymentSchedule(schedule=rule, active=True)])
    assert chosen is None
    assert "FREQ=DAILY" in lost[0]
    assert choose_schedule([replace_active(cron)]) == (None, [])


def replace_active(schedule: DeploymentSchedule) -> DeploymentSchedule:
    """Return a schedule that is paused."""
    return schedule.model_copy(update={"active": False})


ADD = "@workflow.step\ndef add(payload) -> int:\n    return 1 + LIMIT\n"
FILES = {
    "a main block": (TOP, f"LIMIT = 1\n{ADD}flow = workflow.flow\nif __name__ == '__main__':\n    print(flow(1))\n"),
    "a main function": (TOP, f"LIMIT = 1\n{ADD}def main():\n    print(workflow.slug)\nOF_MAIN = [main]\n"),
    "a hook": (TOP, f"LIMIT = 1\n{ADD}flow = workflow.flow\n@flow.on_failure\ndef tell(flow, run, state): ...\n"),
    "options": (TOP, f"LIMIT = 1\n{ADD}flow = workflow.flow.with_options(retries=2)\nNAMES = [flow.name]\n"),
    "an annotation": (TOP.replace("workflow =", "workflow: Workflow ="), f"LIMIT: int = 1\n{ADD}"),
    "another name": ("from pgflow_prefect import Workflow as W\nworkflow = W('shop')\n", f"LIMIT = 1\n{ADD}"),
    "the module": ("import pgflow_prefect as pp, os\nworkflow = pp.Workflow('shop')\n", f"LIMIT = 1\n{ADD}"),
    "a constant of ours": (
        TOP,
        f"from pgflow_prefect import Child\nSETTLE = Child('other')\nOTHERS = [SETTLE]\nLIMIT = 1\n{ADD}",
    ),
    "for type checks": (
        f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pgflow_prefect import Settings\n{TOP}",
        f"LIMIT = 1\n{ADD}",
    ),
    "a form feed": (TOP, f"TEXT = 'a\x85b'\n\f\nLIMIT = 1\n{ADD}"),
    "one line": (TOP, f"COUNT = []; LIMIT = COUNT.append(1) or len(COUNT)\n{ADD}"),
    "a byte-order mark": (f"\ufeff{TOP}", f"LIMIT = 1\n{ADD}"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_names_what_is_gone_can_be_executed(write: Write, airflow: Airflow, case: str) -> None:
    top, source = FILES[case]
    exported = write(source, top=top)
    assert run(exported) == {"add": 2}
    assert not any("function is not" in each for each in exported.lost)
    load(write(source, "airflow", top=top))
    assert airflow.execute("add") == 2


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("a main block", "if __name__ == "),
        ("a main function", "function main uses workflow, which is not there any more"),
        ("a hook", "of function tell, @flow.on_failure"),
        ("options", "with_options(retries=2)"),
        ("a constant of ours", "SETTLE = Child("),
        ("the module", "the module pgflow_prefect"),
    ],
)
def test_what_a_file_leaves_out_is_named(write: Write, case: str, said: str) -> None:
    top, source = FILES[case]
    assert any(said in each for each in write(source, top=top).lost)


@pytest.mark.parametrize("slug", ["orders/daily", "a%b&c", "<a>"])
def test_prefect_accepts_the_flow_of_any_slug(write: Write, slug: str) -> None:
    exported = write("@workflow.step\ndef add():\n    return 1\n", top=TOP.replace("'shop'", repr(slug)), slug=slug)
    assert run(exported) == {"add": 1}
    name = load(exported).exported_flow.name
    assert f"serve(name={name!r}" in exported.text


def test_two_handlers_of_one_name_are_both_refused(write: Write) -> None:
    source = "@workflow.step('a')\ndef work():\n    return 1\n@workflow.step('b')\ndef work():\n    return 2\n"
    lost = write(source).lost
    assert len([each for each in lost if "under its own name, once" in each]) == 2


@pytest.mark.parametrize("name", ["_flow", "_task", "_dag", "_Cron", "_STEPS", "_datetime", "_given", "FailedStep"])
def test_a_name_of_the_file_itself_is_refused(write: Write, name: str) -> None:
    with pytest.raises(UsageError, match=f"has the name '{name}'"):
        write(f"class {name}: ...\n@workflow.step\ndef add():\n    return 1\n")


@pytest.mark.parametrize("name", ["given", "context", "item", "tasks", "payload", "exported_dag", "exported_flow"])
@pytest.mark.parametrize("target", ["prefect", "airflow"])
def test_a_handler_may_have_any_name(write: Write, airflow: Airflow, name: str, target: Target) -> None:
    exported = write(f"@workflow.step('add')\ndef {name}() -> int:\n    return 3\n", target)
    if target == "prefect":
        assert run(exported) == {"add": 3}
    else:
        load(exported)
        assert airflow.execute("add") == 3


def test_branches_are_found_by_another_name_and_in_helpers(write: Write, airflow: Airflow) -> None:
    top = "from pgflow_prefect import Branch as B, Workflow\nworkflow = Workflow('shop')\n"
    helped = "def pick():\n    return B('below', 4)\n@workflow.step\ndef look():\n    return pick()\n"
    load(write(f"{helped}@workflow.step\ndef below(look):\n    return look\n", "airflow", top=top))
    assert airflow.execute("look") == ["below"]
    assert airflow.execute("below") == 4


def test_a_map_over_a_step_with_branches_is_refused_in_airflow(write: Write, airflow: Airflow) -> None:
    source = "@workflow.step\ndef look():\n    return Branch('each', [1])\n"
    load(write(f"{source}@workflow.map(over='look')\ndef each(item):\n    return item\n", "airflow"))
    with pytest.raises(NotImplementedError, match="step with branches"):
        airflow.execute("each")


def test_an_async_generator_gives_a_list(write: Write) -> None:
    assert run(write("@workflow.step\nasync def count():\n    yield 1\n    yield 2\n")) == {"count": [1, 2]}


def test_a_map_registers_one_callback_for_each_item(write: Write) -> None:
    begun: list[Now] = []
    found = run(write(CHARGE), {"orders": [*range(300)]}, begun)
    assert len(found["total"]) == 300
    assert sum({id(each): each.callbacks for each in begun}.values()) == 302


def test_a_map_begins_no_more_items_than_its_bound_at_once(write: Write) -> None:
    module = load(write(CHARGE))
    begun: list[Now] = []
    [step] = [each for each in module._STEPS if each.slug == "charge"]
    flow = module._Run(
        {"charge": replace(step, task=Now(step.task, begun), over="payload", upstream={})}, [5] * 9, True, ""
    )
    going = module._Going([], 0, enumerate(flow.payload), {}, [])
    flow._start_items(flow.steps["charge"], going, step.at_once)
    assert len(begun) == 2
    flow.below = {"charge": []}
    flow._wait()
    assert len(begun) == 3


def test_a_map_begins_no_more_items_after_one_has_failed(write: Write) -> None:
    begun: list[Now] = []
    with pytest.raises(RuntimeError, match="'charge' has failed"):
        run(write(CHARGE), {"orders": ["no number", *range(50)]}, begun)
    assert len(begun) < 5


def test_a_map_with_the_rule_always_waits_for_its_array_in_airflow(write: Write, airflow: Airflow) -> None:
    load(write(CHARGE.replace("at_once=2", "rule='always'"), "airflow"))
    assert airflow.options["charge"]["trigger_rule"] == "all_done"
