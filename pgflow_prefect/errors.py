"""The errors that this package raises. Each message names the thing, what is wrong with it, and what to do."""

from collections.abc import Iterable, Mapping, Sequence
from uuid import UUID


class PgflowPrefectError(Exception):
    """The base of all errors that this package raises on purpose. Its message is for the user."""


class UsageError(PgflowPrefectError):
    """The user asked for something impossible: another name, argument or setting is needed."""


class DatabaseUnavailableError(PgflowPrefectError):
    """PostgreSQL can't be reached, or refuses the connection."""


class DatabaseReadOnlyError(DatabaseUnavailableError):
    """PostgreSQL answers, but can't write: it is a standby, or a failover goes on."""


class PrefectUnavailableError(PgflowPrefectError):
    """Prefect's API can't be reached, or a server for it does not start."""


class PrefectRefusedError(PgflowPrefectError):
    """Prefect's API refuses a request, and would refuse it again."""


class DeploymentGoneError(PrefectUnavailableError):
    """A deployment no longer exists."""


class SchemaMissingError(PgflowPrefectError):
    """The database has no pgflow schema, or one that is older than this package."""


class SchemaNewerError(PgflowPrefectError):
    """The database has schemas of a later version, whose functions this program does not know."""


class NotOnReleasedError(PgflowPrefectError):
    """The database has the schema of the released pgflow, on which a command does not work."""


class HiddenRowsError(PgflowPrefectError):
    """Row-level security hides rows from this process's role, so that an answer would be wrong."""


class ForeignInstallationError(PgflowPrefectError):
    """This database is a copy, or another database uses its id in Prefect. It must not change the other's objects."""


class ForeignDeploymentError(UsageError):
    """Deployments belong to another installation.

    Attributes:
        owners: the ownership tags of each, by workflow slug.
    """

    def __init__(self, owners: Mapping[str, Sequence[str]]) -> None:
        self.owners = owners
        named = "; ".join(f"workflow {slug!r} ({', '.join(tags)})" for slug, tags in owners.items())
        super().__init__(
            f"Prefect has deployments of another installation: {named}. Rename the workflow in one of the databases. "
            "Or take the deployment over with `pgflow-prefect deploy --take-over`: then the other one stops taking "
            "its runs"
        )


class UnknownWorkflowError(UsageError):
    """The database defines no workflow of this slug."""


class UnknownRunError(UsageError):
    """The database has no run of this id."""


class UnknownBackfillError(UsageError):
    """The database has no backfill of this id."""


class InvalidDefinitionError(UsageError):
    """A workflow and its handlers do not fit together.

    Attributes:
        workflow_slug: the workflow.
        problems: every problem found, one sentence each.
    """

    def __init__(self, workflow_slug: str, problems: Iterable[str]) -> None:
        self.workflow_slug = workflow_slug
        self.problems = tuple(problems)
        count = len(self.problems)
        listed = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"workflow {workflow_slug!r} has {count} problem{'s'[: count != 1]}:{listed}")


class DefinitionChangedError(PgflowPrefectError):
    """Another session has edited a workflow since its definition was read."""


class NotRetriableError(PgflowPrefectError):
    """A step failed in a way that another attempt would only repeat."""


class ArgumentInvalidError(NotRetriableError):
    """An argument of a handler does not fit its annotation."""


class PayloadInvalidError(UsageError):
    """A payload does not fit a handler's annotation, and no run is created."""


class ResultInvalidError(NotRetriableError):
    """A handler's result does not fit its annotation, or can't be stored as jsonb."""


class StoredResultError(NotRetriableError):
    """The object of a result in a storage is missing, has changed, or is not the one of this step."""


class StorageError(PgflowPrefectError):
    """A storage of results did not answer, or refuses. Another attempt may succeed."""


class ReturnedStateError(PgflowPrefectError):
    """A handler returned a state of Prefect that means a failure.

    Attributes:
        state_name: Prefect's name of it.
        reason: its message.
    """

    def __init__(self, state_name: str, reason: str) -> None:
        self.state_name = state_name
        self.reason = reason
        super().__init__(f"{state_name}: {reason}" if reason else state_name)


class ReturnedEndError(ReturnedStateError, NotRetriableError):
    """A handler returned a state of Prefect that another attempt would not change, such as Cancelled."""


class ReportRefusedError(NotRetriableError):
    """PostgreSQL refuses a step's completion for good. Another execution of its handler would not change that."""


class WriteRefusedError(PgflowPrefectError):
    """PostgreSQL refuses for good to note the claim or the end of a step: a trigger of a user's, say.

    The run is set aside until the reason is gone. The handler is not at fault.
    """


class UnstorableTextError(ResultInvalidError):
    """A text has a character that the database's encoding does not have."""


class RetryLaterError(PgflowPrefectError):
    """A step failed, and the server that refused it said when to try again.

    Attributes:
        after: seconds from now; None for the step's own delay.
    """

    def __init__(self, message: str, after: float | None) -> None:
        self.after = after
        super().__init__(message)


class CommandFailedError(PgflowPrefectError):
    """A program that does a step has failed. The message has its exit code and its last lines."""


class PoolStepFailedError(PgflowPrefectError):
    """An attempt of a step on a work pool has failed, or its process is gone."""


class StepTimeoutError(PgflowPrefectError, TimeoutError):
    """A handler took longer than its step's `timeout_seconds`."""


class NoConnectionError(PgflowPrefectError):
    """A step got no connection for its handler in time: the server is full, away or read-only."""


class HandlerRaisedError(PgflowPrefectError):
    """A handler raised an exception that is not ordinary, or that can't be printed or changed.

    `SystemExit` would end the process. `StopIteration` can't pass through a coroutine. An exception whose `str()`
    raises breaks its reports. A frozen exception breaks context managers. The message has the type and the text, and
    `__cause__` is the original exception.
    """


class RunNotPendingError(PgflowPrefectError):
    """The run has ended, so no step of it can be claimed."""


class RunHeldError(PgflowPrefectError):
    """Another owner holds the run, and its lease has not run out."""


class RunFailedError(PgflowPrefectError):
    """A run ended as failed.

    Attributes:
        run_id: the run.
    """

    def __init__(self, run_id: UUID, reason: str) -> None:
        self.run_id = run_id
        super().__init__(f"run {run_id} failed: {reason}")


class SupersededError(PgflowPrefectError):
    """Another owner has taken the run. This owner stops, and leaves the run alone.

    Attributes:
        run_id: the run.
    """

    def __init__(self, run_id: UUID) -> None:
        self.run_id = run_id
        super().__init__(f"run {run_id} was taken over by another flow run; this one stops")


def find_first(error: BaseException) -> BaseException:
    """Return the first exception of a group, or the exception itself if it is no group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class TransientError(DatabaseUnavailableError):
    """PostgreSQL could not answer at this moment. The same statement may succeed a moment later.

    Attributes:
        is_of_rows: the statement met a lock, a time-out or a conflict: a statement about other rows may succeed now.
    """

    def __init__(self, message: str, *, is_of_rows: bool = False) -> None:
        self.is_of_rows = is_of_rows
        super().__init__(message)


NO_REFUSALS = (DatabaseUnavailableError, SupersededError, RunNotPendingError, ResultInvalidError)
"""Errors of a claim or a report that have another reason than a trigger or rule that refuses it for good."""
