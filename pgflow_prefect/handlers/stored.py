"""Results in a storage: the part of a step's execution that writes its own one, and reads those of its upstream steps.

Code and the worker's settings alone name storages and serializers. A row only says which attempt of a task has written.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import anyio
from anyio import CapacityLimiter

from pgflow_prefect.errors import StoredResultError
from pgflow_prefect.handlers.codecs import JSON_CODECS, Codec
from pgflow_prefect.handlers.raised import describe
from pgflow_prefect.handlers.references import MARK, Reference, ResultAddress, may_be_reference, parse_reference
from pgflow_prefect.handlers.threads import run_in_thread
from pgflow_prefect.raw_json import RawJson, write_object

_READS = 8  # objects that a step reads at the same time


class Storage(Protocol):
    """Keeps the bytes of results by key."""

    @property
    def name(self) -> str:
        """What people call it, without secrets."""

    async def read(self, key: str) -> bytes:
        """Return the bytes of an object.

        Raises:
            FileNotFoundError: there is none of this key.
            StorageError: the storage does not answer, or refuses.
        """

    async def write(self, key: str, data: bytes) -> None:
        """Write an object.

        Raises:
            StorageError: the storage does not answer, or refuses.
        """


@dataclass(frozen=True)
class ResultOptions:
    """What code or settings say of results.

    Attributes:
        storage: one of Prefect's blocks, or the name of one; None if it names none.
        codec: the form in which results are written; None if it names none.
    """

    storage: object | None = None
    codec: Codec | None = None

    @property
    def passes_objects(self) -> bool:
        """Whether the next steps get the values themselves, and not what their JSON means."""
        return self.codec is not None and not self.codec.is_json

    def or_else(self, other: "ResultOptions") -> "ResultOptions":
        """Return these options, with another's in the place of what they don't name."""
        return ResultOptions(self.storage or other.storage, self.codec or other.codec)


@dataclass(frozen=True)
class ResultPlace:
    """Where the results of a step are.

    Attributes:
        storage: keeps them.
        codec: the form in which they are written.
        always: all results of the step are there, not only those that a row can't have.
    """

    storage: Storage
    codec: Codec
    always: bool

    def takes(self, text: str, limit: int) -> bool:
        """Tell whether the result with this JSON is stored here, and not in the row."""
        if text == "null":
            return False
        # What looks like a reference would be taken for one in a row.
        return self.always or may_be_reference(text) or len(text.encode("utf-8", "surrogatepass")) > limit


@dataclass(frozen=True)
class Inputs:
    """The results of upstream steps.

    Attributes:
        results: an object of their JSON, by slug.
        objects: those that are no JSON, by slug.
    """

    results: RawJson
    objects: Mapping[str, Any] = field(default_factory=dict)


class Unread(dict[str, Any]):
    """A reference in the place of the value that it refers to."""


def leave_unread(results: RawJson) -> Inputs:
    """Return the results of upstream steps with references where a value is in a storage."""
    if MARK not in results.text:
        return Inputs(results)
    members = results.split().items()
    return Inputs(results, {slug: Unread(json.loads(raw.text)) for slug, raw in members if parse_reference(raw)})


@dataclass(frozen=True)
class StepResults:
    """Writes the result of one attempt, and reads the results of its run's steps.

    Attributes:
        address: the task that is executed.
        attempt: the attempt.
        limit: the most bytes of JSON that a row has.
        find_place: returns where the results of a step are, by its slug; None if they are in rows only.
        holder: this process, if a work pool does the attempt.
    """

    address: ResultAddress
    attempt: int
    limit: int
    find_place: Callable[[str], ResultPlace | None]
    holder: str | None = None

    @property
    def own(self) -> ResultPlace | None:
        """Where the results of this step are."""
        return self.find_place(self.address.step_slug)

    async def save(self, data: bytes) -> str:
        """Write this attempt's result, and return the reference to it as JSON text.

        Raises:
            StorageError: the storage does not answer, or refuses.
        """
        place = self.own
        assert place is not None
        key = self.address.make_key(self.attempt, self.holder)
        make = partial(
            Reference.of,
            data,
            storage=place.storage.name,
            key=key,
            serializer=place.codec.name,
            attempt=self.attempt,
            index=self.address.index,
            holder=self.holder,
        )
        reference = await run_in_thread(make)
        await place.storage.write(key, data)
        return reference.write()

    async def resolve(self, results: RawJson) -> Inputs:
        """Return the results of upstream steps with the values in the place of the references.

        Args:
            results: an object, by slug.

        Raises:
            UnreadableJsonError: Python can't read it.
            StoredResultError: an object is missing, has changed, or is not of that step.
            StorageError: a storage does not answer, or refuses.
        """
        members = results.split()
        found = {slug: reference for slug, raw in members.items() if (reference := parse_reference(raw)) is not None}
        read = await self._read_all(found)
        objects = {slug: value for slug, value in read.items() if not isinstance(value, RawJson)}
        texts = {slug: value for slug, value in read.items() if isinstance(value, RawJson)}
        return Inputs(write_object(members | texts) if texts else results, objects)

    async def _read_all(self, references: Mapping[str, Reference]) -> dict[str, Any]:
        read: dict[str, Any] = {}
        limiter, errors = CapacityLimiter(_READS), list[Exception]()

        async def read_one(slug: str, reference: Reference, place: ResultPlace) -> None:
            async with limiter:
                try:
                    read[slug] = await self.load(slug, reference, place)
                except Exception as error:  # noqa: BLE001  raised below, not in a group
                    errors.append(error)
                    group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for slug, reference, place in self._find_places(references):
                group.start_soon(read_one, slug, reference, place)
        if errors:
            raise errors[0]
        return read

    def _find_places(self, references: Mapping[str, Reference]) -> Iterable[tuple[str, Reference, ResultPlace]]:
        for slug, reference in references.items():
            place = self.find_place(slug)
            if place is not None:
                yield slug, reference, place
            elif self.is_of(slug, reference):
                raise StoredResultError(
                    f"the result of step {slug!r} is in a storage ({reference.describe()}), and this process knows "
                    "none for it: name it by result_storage= in the file of handlers, or by PGFLOW_RESULT_STORAGE"
                )

    def _make_key(self, slug: str, reference: Reference) -> str:
        return replace(self.address, step_slug=slug, index=0).make_key(reference.attempt, reference.holder)

    def is_of(self, slug: str, reference: Reference) -> bool:
        """Tell whether a reference is to a result of this step in this run."""
        return reference.key == self._make_key(slug, reference)

    async def load(self, slug: str, reference: Reference, place: ResultPlace) -> Any:  # noqa: ANN401  any value
        """Return a step's result: `RawJson`, or the value that the serializer returns.

        Raises:
            StoredResultError: the object is missing, has changed, or is not of that step.
            StorageError: the storage does not answer, or refuses.
        """
        codec = place.codec
        if reference.serializer != codec.name:
            codec = JSON_CODECS.get(reference.serializer, codec)
        if reference.serializer != codec.name:
            raise StoredResultError(
                f"the result of step {slug!r} was written with the serializer {reference.serializer!r}, and the code "
                f"or the settings of this process name {codec.name!r} for it: name the former one by "
                "result_serializer="
            )
        data = await self.read(slug, reference, place)
        return await run_in_thread(partial(_decode, slug, codec, data))

    async def read(self, slug: str, reference: Reference, place: ResultPlace) -> bytes:
        """Return the bytes of a step's result.

        Raises:
            StoredResultError: the object is missing, has changed, or is not of that step.
            StorageError: the storage does not answer, or refuses.
        """
        what = f"the result of step {slug!r}"
        if not self.is_of(slug, reference):
            raise StoredResultError(
                f"{what} refers to {reference.key!r} in a storage, which is no result of that step in this run and "
                "this database: it is not read"
            )
        try:
            data = await place.storage.read(reference.key)
        except FileNotFoundError:
            raise StoredResultError(
                f"{what} is missing from {place.storage.name}: there is no object {reference.key}. Bring it back, or "
                "start a new run"
            ) from None
        if not await run_in_thread(partial(reference.fits, data)):
            raise StoredResultError(
                f"{what} has changed in {place.storage.name} since it was written: the object {reference.key} has "
                f"{len(data):,} of {reference.size:,} bytes, or another SHA-256 than its row says. Bring it back, or "
                "start a new run"
            )
        return data


def _decode(slug: str, codec: Codec, data: bytes) -> Any:  # noqa: ANN401
    try:
        return codec.decode(data)
    except Exception as error:  # the serializer, and the classes that it makes
        raise StoredResultError(
            f"the result of step {slug!r} can't be read with the serializer {codec.name!r}: {describe(error)}"
        ) from error
