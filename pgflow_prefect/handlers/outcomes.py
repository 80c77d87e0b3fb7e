"""How a handler says that its step is skipped, or which of its branches are taken."""

import types
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

from pgflow_prefect.errors import PgflowPrefectError, UsageError
from pgflow_prefect.models import AnyOutcome, BranchOutcome, SkipOutcome

T = TypeVar("T")


class Skip(PgflowPrefectError):  # noqa: N818  a user raises it, and nothing has failed
    """Raised by a handler whose step is not needed this time: it ends as skipped.

    What the handler has written through `context.connection` is committed with that.

    Example: `raise Skip("nothing new since yesterday")`

    Attributes:
        note: why, for people.
        cascade: whether the steps below it are skipped, too, unless their rules say otherwise.
    """

    def __init__(self, note: str | None = None, *, cascade: bool = True) -> None:
        """Say why.

        Args:
            note: for people.
            cascade: false: what waits for the step goes on without its result.
        """
        self.note = note
        self.cascade = cascade
        super().__init__(note or "skipped")

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the call that makes it again in another process."""
        return _make_skip, (self.note, self.cascade)


def _make_skip(note: str | None, cascade: bool) -> Skip:
    return Skip(note, cascade=cascade)


class Branch(Generic[T]):
    """Returned by a handler that chooses which of the steps that wait for it are taken; the others are skipped.

    A step that a taken one leads to is not skipped. A step that joins branches needs the rule `none_failed` or
    `none_failed_min_one_success`.

    Example: `return Branch("full", result=report)`

    Attributes:
        taken: the slugs of the steps that are taken.
        result: the step's own result.
        whole: whether what is below the others is skipped, too, whatever its rules say.
    """

    def __init__(self, taken: str | Collection[str], result: T | None = None, *, whole: bool = False) -> None:
        """Choose.

        Args:
            taken: a slug, or several; none of them: `[]`.
            result: the step's own result; without one it is `null`, whatever the annotation says.
            whole: skip all that is below the others, whatever its rules say.

        Raises:
            UsageError: a slug is no text.
        """
        self.taken = (taken,) if isinstance(taken, str) else tuple(taken)
        self.result = result
        self.whole = whole
        for slug in self.taken:
            if not isinstance(slug, str):
                raise UsageError(f"Branch takes the slugs of steps, and {slug!r} is no text")

    def __repr__(self) -> str:
        return f"Branch({list(self.taken)!r}, whole={self.whole})"


@dataclass(frozen=True)
class Decided:
    """The result of a handler that has decided more than its value.

    Attributes:
        result: JSON text.
        outcome: what is to be reported; None for a step that is just completed.
    """

    result: str
    outcome: AnyOutcome | None = None

    @classmethod
    def to_skip(cls, skip: Skip) -> "Decided":
        """Return the result of a step that is skipped."""
        # Text in PostgreSQL has no NUL, and half a character is none.
        note = None if skip.note is None else str(skip.note).replace("\0", "\\0").encode(errors="replace").decode()
        return cls("null", SkipOutcome(skip=True, note=note, cascade=bool(skip.cascade)))

    @classmethod
    def to_branch(cls, branch: Branch[Any], result: str) -> "Decided":
        """Return the result of a step that takes branches."""
        return cls(result, BranchOutcome(taken=list(branch.taken), whole=bool(branch.whole)))


def find_returned(hint: Any) -> Any:  # noqa: ANN401  any annotation
    """Return the annotation of a result without `Branch`: `Report` of `Branch[Report]`."""
    if hint is Branch:
        return Any
    origin = get_origin(hint)
    if origin is Branch:
        return get_args(hint)[0]
    if origin in (Union, types.UnionType):
        return Union[tuple(find_returned(each) for each in get_args(hint))]  # noqa: UP007  of a tuple
    return hint
