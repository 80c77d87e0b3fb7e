"""Options of deployments, for `deploy` and `import --deploy`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from pgflow_prefect.deployment.deployments.wanted import Options

Text = str | None


@Parameter(name="*")
@dataclass(frozen=True)
class DeployFlags:
    """Options of the deployments, as typed. An option that is not given leaves Prefect's value alone."""

    work_pool: Annotated[Text, Parameter(help="The work pool whose workers execute the flow runs.")] = None
    no_work_pool: Annotated[
        bool,
        Parameter(
            negative="", show_default=False, help="Remove the work pool. Then `worker` or `serve` executes the runs."
        ),
    ] = False
    cron: Annotated[Text, Parameter(help='"0 9 * * 1-5": start a run at these times.')] = None
    interval: Annotated[Text, Parameter(help="Start a run every 30s, 15m, 2h, 1d.")] = None
    timezone: Annotated[Text, Parameter(help="The time zone of --cron or --interval, such as Europe/Berlin.")] = None
    payload: Annotated[
        Text, Parameter(help="JSON: the payload of the runs that the schedule starts. It stays in PostgreSQL.")
    ] = None
    schedule_name: Annotated[
        Text, Parameter(help="The schedule that is meant, if a deployment is to have several: nightly.")
    ] = None
    no_schedule: Annotated[
        bool, Parameter(negative="", show_default=False, help="Remove the schedule of --cron or --interval.")
    ] = False
    tag: Annotated[
        tuple[str, ...], Parameter(negative="", show_default=False, help="A tag; may be given several times.")
    ] = ()
    concurrency_limit: Annotated[
        Text, Parameter(help="The number of flow runs of a deployment at the same time, or none for any number.")
    ] = None
    image: Annotated[Text, Parameter(help="The image that the work pool starts flow runs in.")] = None
    source: Annotated[
        Text, Parameter(help="The git repository that workers clone: git+https://HOST/OWNER/REPOSITORY@BRANCH.")
    ] = None
    source_credentials: Annotated[
        Text,
        Parameter(
            help="The Prefect block with the credentials for cloning: TYPE/NAME, as `prefect block ls` prints it."
        ),
    ] = None
    block: Annotated[Text, Parameter(help="The Prefect block that has the database's address.")] = None
    on_failure: Annotated[
        Text,
        Parameter(help="The notification block, TYPE/NAME, that an automation uses when a run has failed."),
    ] = None
    no_on_failure: Annotated[
        bool, Parameter(negative="", show_default=False, help="Remove the automation of --on-failure.")
    ] = False
    take_over: Annotated[
        bool,
        Parameter(negative="", show_default=False, help="Take over deployments of another installation."),
    ] = False

    def name_given(self) -> list[str]:
        """Return the options that were given."""
        given = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        return [f"--{name.replace('_', '-')}" for name in given]

    def parse(self, directory: str | None = None) -> Options:
        """Return what the options mean.

        Args:
            directory: what stands for the current directory on the workers' machine, in the image or the repository.

        Raises:
            UsageError: one of them is wrong, or they do not go together.
        """
        from pgflow_prefect.cli.run import read_payload
        from pgflow_prefect.deployment.deployments.location import parse_location
        from pgflow_prefect.deployment.deployments.schedules import parse_schedule
        from pgflow_prefect.deployment.deployments.wanted import Options

        return Options(
            work_pool=_parse_pool(self.work_pool, remove=self.no_work_pool),
            tags=self.tag,
            schedule=parse_schedule(
                self.cron,
                self.interval,
                self.timezone,
                self.no_schedule,
                name=self.schedule_name,
                payload=None if self.payload is None else read_payload(self.payload),
            ),
            concurrency_limit=_parse_limit(self.concurrency_limit),
            image=self.image,
            block=self.block,
            location=parse_location(self.source, self.source_credentials, directory),
            take_over=self.take_over,
            on_failure=_parse_on_failure(self.on_failure, remove=self.no_on_failure),
        )


NO_FLAGS = DeployFlags()


def _parse_pool(name: str | None, *, remove: bool) -> str | None:
    from pgflow_prefect.deployment.deployments.wanted import NO_POOL

    if remove and name is not None:
        raise UsageError("--work-pool and --no-work-pool exclude each other: name one")
    if name == NO_POOL:
        raise UsageError("--work-pool '' names no work pool. To remove it, use --no-work-pool")
    return NO_POOL if remove else name


def _parse_on_failure(reference: str | None, *, remove: bool) -> str | None:
    from pgflow_prefect.deployment.deployments.automations import check_block_reference
    from pgflow_prefect.deployment.deployments.wanted import NO_BLOCK

    if remove and reference is not None:
        raise UsageError("--on-failure and --no-on-failure exclude each other: name one")
    if reference is not None:
        return check_block_reference(reference)
    return NO_BLOCK if remove else None


def _parse_limit(text: str | None) -> int | None:
    from pgflow_prefect.deployment.deployments.wanted import NO_LIMIT

    if text is None:
        return None
    if text == "none":
        return NO_LIMIT
    if not (text.isascii() and text.isdigit()) or int(text) > 2**31 - 1:
        raise UsageError(
            f"--concurrency-limit {text!r} is not a number of flow runs. Give 1 or more, or none for any number"
        )
    return int(text)
