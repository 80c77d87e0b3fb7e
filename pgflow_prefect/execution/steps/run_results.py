"""Where the results of a run's steps are, according to code and settings."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from uuid import UUID

from pgflow_prefect.errors import NotRetriableError
from pgflow_prefect.handlers.base import Toolbox
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.handlers.codecs import JsonCodec
from pgflow_prefect.handlers.references import ResultAddress
from pgflow_prefect.handlers.stored import ResultOptions, ResultPlace, StepResults
from pgflow_prefect.models import TaskKey

_ROWS_ONLY = ResultOptions()


@dataclass(frozen=True)
class RunResults:
    """What the code of a workflow says of its steps' results.

    Attributes:
        installation: the id of the database; it begins the keys of all objects.
        options: by step slug, of the steps that have a function here.
        holder: this process, if it does an attempt for a work pool.
    """

    installation: UUID
    options: Mapping[str, ResultOptions]
    holder: str | None = None

    @classmethod
    def of(cls, installation: UUID, handlers: Mapping[str, StepHandlers], holder: str | None = None) -> "RunResults":
        """Return what these handlers say."""
        options = {slug: each.function.results for slug, each in handlers.items() if each.function is not None}
        return cls(installation, options, holder)

    def pick(self, slugs: tuple[str, ...]) -> "RunResults":
        """Return what is said of these steps, for another process."""
        return replace(self, options={slug: self.options[slug] for slug in slugs if slug in self.options})

    def open(self, toolbox: Toolbox, run_id: UUID, task: TaskKey, attempt: int) -> StepResults:
        """Return the part that writes the result of an attempt, and reads those of its upstream steps."""
        address = ResultAddress(self.installation, run_id, task.step_slug, task.index)
        return StepResults(
            address, attempt, toolbox.result_limit, lambda slug: self._find_place(slug, toolbox), self.holder
        )

    def check(self, slug: str, toolbox: Toolbox) -> None:
        """Refuse a step whose result could not be stored, before its handler works.

        Raises:
            NotRetriableError: it names a serializer, and neither code nor settings name a storage.
        """
        said = self.options.get(slug, _ROWS_ONLY)
        if said.codec is not None and said.storage is None and toolbox.results.storage is None:
            raise NotRetriableError(
                f"step {slug!r} has result_serializer={said.codec.name!r} and no storage: name one by "
                "result_storage=, or by PGFLOW_RESULT_STORAGE"
            )

    def _find_place(self, slug: str, toolbox: Toolbox) -> ResultPlace | None:
        said = self.options.get(slug)
        if said is None:  # another program does it, so its result is what its row has
            return None
        storage = said.storage or toolbox.results.storage
        if storage is None:
            return None
        codec = said.codec or toolbox.results.codec or JsonCodec()
        always = said.storage is not None or said.codec is not None
        return ResultPlace(toolbox.find_storage(storage), codec, always)
