"""What a row has of a result that is in a storage: a small JSON reference. And the key that its object must have."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pgflow_prefect.raw_json import RawJson

MARK = "$pgflow_result"
"""The only member of a reference's JSON object."""

_BEGINNING = f'{{"{MARK}"'
_LONGEST = 4096  # characters of a reference

_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Holder = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


def find_folder(installation: UUID) -> str:
    """Return the prefix of all keys of an installation."""
    return f"pgflow/{installation}"


@dataclass(frozen=True, slots=True)
class ResultAddress:
    """The task whose results a key belongs to.

    Attributes:
        installation: the id of the database.
        run_id: the run.
        step_slug: the step.
        index: of the task within the step.
    """

    installation: UUID
    run_id: UUID
    step_slug: str
    index: int = 0

    def make_key(self, attempt: int, holder: str | None = None) -> str:
        """Return the key of the object that an attempt writes. No other attempt writes to it, not even a late one.

        Args:
            attempt: the attempt.
            holder: the process of a work pool that does it: another one may do the same attempt once its lease is over.
        """
        # A slug may have any characters, so a path has only its hash.
        step = sha256(self.step_slug.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return f"{find_folder(self.installation)}/{self.run_id}/{step}-{self.index}-{attempt}" + (
            f"-{holder}" if holder is not None else ""
        )


class Reference(BaseModel):
    """A result that is in a storage.

    It says nothing that a worker would follow: code or settings name the storage and the serializer, and the task and
    the attempt make the key. `storage`, `key` and `serializer` tell people and other programs.

    Attributes:
        storage: the name of the storage.
        key: of the object there.
        sha256: of its bytes.
        size: in bytes.
        serializer: has written it.
        attempt: has written it.
        index: of the task that has written it.
        holder: the process of a work pool that has written it; None if no work pool did.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    storage: str
    key: str
    sha256: _Sha256
    size: Annotated[int, Field(ge=0)]
    serializer: str
    attempt: Annotated[int, Field(ge=0, le=2**31)]
    index: Annotated[int, Field(ge=0, le=2**31)] = 0
    holder: _Holder | None = None

    @classmethod
    def of(
        cls,
        data: bytes,
        *,
        storage: str,
        key: str,
        serializer: str,
        attempt: int,
        index: int = 0,
        holder: str | None = None,
    ) -> "Reference":
        """Return the reference to an object with these bytes."""
        return cls(
            storage=storage,
            key=key,
            sha256=sha256(data).hexdigest(),
            size=len(data),
            serializer=serializer,
            attempt=attempt,
            index=index,
            holder=holder,
        )

    def write(self) -> str:
        """Return it as JSON text."""
        return f"{_BEGINNING}:{self.model_dump_json(exclude_defaults=True)}}}"

    def fits(self, data: bytes) -> bool:
        """Tell whether these are the bytes that were written."""
        return len(data) == self.size and sha256(data).hexdigest() == self.sha256

    def describe(self) -> str:
        """Return it in words."""
        return f"{self.size:,} bytes of {self.serializer} in {self.storage}"


class _Marked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    reference: Annotated[Reference, Field(alias=MARK)]


def may_be_reference(text: str) -> bool:
    """Tell whether a JSON text looks like a reference, so that a result of a handler must not stand in a row so."""
    return text.lstrip().startswith(_BEGINNING)


def parse_reference(raw: RawJson) -> Reference | None:
    """Return the reference that a result of a row is; None if it is a value."""
    if len(raw.text) > _LONGEST or not may_be_reference(raw.text):
        return None
    try:
        return _Marked.model_validate_json(raw.text).reference
    except ValidationError:
        return None
