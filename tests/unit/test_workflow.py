"""What users write against: steps get their handlers, and the flow is the user's own to Prefect."""

import os
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import load_flow_from_entrypoint
from pydantic import JsonValue

from pgflow_prefect import SqlFunction, StepContext, Workflow
from pgflow_prefect.bindings import WorkPool
from pgflow_prefect.deployment.handler_files import load_module
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.base import RetryPolicy
from pgflow_prefect.handlers.python import PythonHandler
from tests.unit.definitions import define

if TYPE_CHECKING:
    from prefect import Flow

HANDLERS = """
    from pgflow_prefect import Workflow

    campaign = Workflow("email/campaign", description="Mails to all recipients.")


    @campaign.step
    async def send(payload: dict[str, int]) -> int:
        return payload["n"]


    flow = campaign.flow
"""


@pytest.fixture
def handlers(tmp_path: Path) -> ModuleType:
    """The module of a user's file."""
    path = tmp_path / "campaign.py"
    path.write_text(dedent(HANDLERS))
    return load_module(str(path))


def test_a_step_has_the_name_of_its_function_or_the_given_slug() -> None:
    workflow = Workflow("campaign")

    @workflow.step
    def prepare() -> None: ...

    @workflow.step("send-emails")
    def send() -> None: ...

    @workflow.step()
    def report() -> None: ...

    assert list(workflow.handlers) == ["prepare", "send-emails", "report"]
    assert repr(workflow) == "Workflow('campaign', steps=['prepare', 'send-emails', 'report'])"


def test_the_function_stays_what_it_was() -> None:
    workflow = Workflow("campaign")

    @workflow.step("add-one", retries=3)
    def add_one(payload: int) -> int:
        return payload + 1

    assert add_one(1) == 2
    assert workflow.handlers["add-one"].function is add_one


def test_a_handler_keeps_how_it_is_to_be_retried() -> None:
    workflow = Workflow("campaign")

    @workflow.step(retries=3, retry_delay_seconds=[1, 10, 60], retry_jitter_factor=0.5, timeout_seconds=300)
    def send() -> None: ...

    assert workflow.handlers["send"].policy == RetryPolicy(3, [1, 10, 60], 0.5, 300)


def test_a_step_has_one_handler() -> None:
    workflow = Workflow("campaign")
    workflow.step("send")(lambda: None)
    with pytest.raises(UsageError, match="step 'send' of workflow 'campaign' has two handlers: remove one"):
        workflow.step("send")(lambda: None)
    with pytest.raises(UsageError, match="two handlers"):
        workflow.step("send", unimplemented=True)(lambda: None)


def test_a_function_that_can_t_be_bound_by_name_is_refused_where_it_is_decorated() -> None:
    with pytest.raises(UsageError, match=r"step 'send' takes \*results"):
        Workflow("campaign").step("send")(lambda *results: None)


def test_a_stub_is_no_handler_and_its_step_is_external() -> None:
    workflow = Workflow("campaign")

    @workflow.step(unimplemented=True)
    def prepare() -> None: ...

    @workflow.step
    def send(prepare: JsonValue) -> None: ...

    assert list(workflow.handlers) == ["send"]
    assert workflow.stubs == ["prepare"]
    assert workflow.find_problems(define({"prepare": [], "send": ["prepare"]})) == []
    assert [*workflow.step_handlers] == ["send"]


def test_a_stub_of_a_step_that_is_gone_only_fits_no_step() -> None:
    workflow = Workflow("campaign")
    workflow.step("gone", unimplemented=True)(lambda: None)
    workflow.step("send")(lambda: None)
    (problem,) = workflow.find_problems(define({"send": []}))
    assert problem.startswith("handler 'gone' fits no step")


def test_problems_of_definition_handlers_and_annotations_come_together() -> None:
    workflow = Workflow("campaign")

    @workflow.step
    def prepare(missing: int) -> None: ...

    @workflow.step
    def send(payload: "Undefined") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    problems = workflow.find_problems(define({"prepare": [], "send": ["prepare"], "report": ["send"]}))
    assert [problem.split(",")[0] for problem in problems] == [
        "the handler of step 'prepare' takes 'missing'",
        "the handler of step 'send' has an annotation that can't be used: name 'Undefined' is not defined",
    ]


def test_handlers_that_fit_have_no_problem() -> None:
    workflow = Workflow("campaign")

    @workflow.step
    def prepare(payload: list[int], context: StepContext) -> list[int]:
        return payload

    @workflow.step("send-emails")
    def send(prepare: list[int]) -> int:
        return len(prepare)

    assert workflow.find_problems(define({"prepare": [], "send-emails": ["prepare"]})) == []


def test_a_flow_is_the_user_s_file_to_prefect(handlers: ModuleType, tmp_path: Path) -> None:
    flow = handlers.flow
    assert flow._entrypoint == f"{tmp_path / 'campaign.py'}:campaign.flow"
    assert flow.fn.__module__ == handlers.__name__
    assert flow.fn.__doc__ == flow.description == "Mails to all recipients."
    assert flow is handlers.campaign.flow


def test_a_deployment_of_a_flow_points_into_the_user_s_file(handlers: ModuleType, tmp_path: Path) -> None:
    entrypoint = RunnerDeployment.from_flow(handlers.flow, name="x").entrypoint
    assert entrypoint == f"{os.path.relpath(tmp_path / 'campaign.py')}:campaign.flow"


def test_prefect_loads_the_flow_from_where_its_deployment_points(handlers: ModuleType) -> None:
    entrypoint = RunnerDeployment.from_flow(handlers.flow, name="x").entrypoint
    assert entrypoint is not None
    loaded: Flow[..., Any] = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    assert loaded.name == handlers.flow.name
    assert loaded.fn.__doc__ == "Mails to all recipients."


def test_a_run_is_asked_for_with_any_payload_or_with_the_id_of_a_run(handlers: ModuleType) -> None:
    parameters = handlers.flow.parameters.properties
    assert set(parameters) == {"payload", "run_id", "schedule_id"}
    assert handlers.flow.parameters.required == []


@pytest.mark.parametrize(
    ("slug", "name"),
    [
        ("email_campaign", "email_campaign"),
        ("50% off & more", "50_ off _ more-4c3ba47e"),
        ("a/b<c>", "a_b_c_-4d2cdecb"),
        ("a\nb\x1b", "a_b_-f7e95dd6"),
        ("größe 🚀", "größe 🚀"),
    ],
)
def test_a_flow_s_name_is_the_workflow_s_slug_as_prefect_takes_it(slug: str, name: str) -> None:
    assert Workflow(slug).flow.name == name


def test_slugs_that_differ_have_flows_of_different_names() -> None:
    slugs = ["a/b", "a_b", "a%b", "a\nb", "a\tb", "a b"]
    assert len({Workflow(slug).flow.name for slug in slugs}) == len(slugs)


def test_a_workflow_that_no_name_stands_for_still_has_a_flow() -> None:
    flow = Workflow("campaign").flow
    assert flow.fn.__module__ == __name__
    assert flow.fn.__qualname__ == "flow"


def test_the_handlers_of_all_steps_are_gathered_once() -> None:
    class Counting(Workflow):
        counted = 0

        @property
        def handlers(self) -> Mapping[str, PythonHandler]:
            self.counted += 1
            return super().handlers

    workflow = Counting("wide")
    for number in range(100):
        workflow.step(f"step_{number}")(lambda: None)
    assert len(workflow.step_handlers) == 100
    assert workflow.counted == 1, "gathered again for each step, a run of n steps would begin with n²"


def test_a_workflow_is_described_by_the_docstring_of_its_module() -> None:
    module = ModuleType("orders", "Ships orders.\n\n    Every night.")
    exec("from pgflow_prefect import Workflow\nworkflow = Workflow('ship')", vars(module))  # noqa: S102
    assert module.workflow.flow.description == "Ships orders.\n\nEvery night."
    exec("other = Workflow('other', description='Said here.')", vars(module))  # noqa: S102
    assert module.other.flow.description == "Said here."


def test_a_map_is_bound_to_no_work_pool_and_a_plain_step_to_no_batch() -> None:
    workflow = Workflow("orders")
    with pytest.raises(UsageError, match="can't be done on a work pool"):
        workflow.bind_map("price", WorkPool("containers"), over="payload")
    with pytest.raises(UsageError, match="which only maps have"):
        workflow.bind("price", SqlFunction("shop.price", batch=2))
    with pytest.raises(UsageError, match="at_once=0 is no number of items"):
        workflow.bind_map("price", SqlFunction("shop.price"), over="payload", at_once=0)
