"""What a workflow that was defined elsewhere says beside its steps: for its stubs, and for its ledger."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from pgflow_prefect.wording import clean, write_code


@dataclass(frozen=True)
class StepOrigin:
    """What a stub says of where its step comes from.

    Attributes:
        options: of the decorator, beside the rules.
        lines: of the docstring, without secrets.
    """

    options: Mapping[str, JsonValue] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """What a file of stubs says of where its workflow comes from.

    Attributes:
        steps: by slug.
        options: of the `Workflow`.
        lines: of the file's docstring, without secrets.
    """

    steps: Mapping[str, StepOrigin] = field(default_factory=dict)
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


_NAMED = 12


def list_names(names: Sequence[str]) -> str:
    """Return names as code, by commas; after a dozen, the rest is counted."""
    shown = ", ".join(map(write_code, names[:_NAMED]))
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown


HERE = Origin()
NOTHING = StepOrigin()


@dataclass(frozen=True)
class LedgerLine:
    """One thing that the workflow said where it comes from, and what becomes of it here.

    Attributes:
        about: the step; None for the workflow.
        topic: what kind of thing it is, in a few words.
        says: sentences, without secrets, as Markdown.
        is_done: it means the same here, and nothing is left to do.
    """

    about: str | None
    topic: str
    says: str
    is_done: bool

    @property
    def text(self) -> str:
        """The line as an entry of a list in Markdown."""
        about = "" if self.about is None else f"{write_code(self.about)} "
        return f"{about}**{clean(self.topic)}**: {clean(self.says)}"

    def write(self) -> str:
        """Return the line with its box: ticked where nothing is left to do."""
        return f"- [{'x' if self.is_done else ' '}] {self.text}"


@dataclass(frozen=True)
class Ledger:
    """All differences between a workflow here and where it comes from.

    Attributes:
        title: what was imported, as Markdown.
        lines: first those of the workflow, then those of its steps.
    """

    title: str
    lines: tuple[LedgerLine, ...]

    def write(self) -> str:
        """Return the page."""
        parts = [f"# {clean(self.title)}", "", *_INTRODUCTION]
        for heading, lines in self._split():
            parts += ["", f"## {heading}", "", *(line.write() for line in lines)]
        return "\n".join([*parts, ""])

    def _split(self) -> Iterable[tuple[str, Sequence[LedgerLine]]]:
        for heading, is_of_workflow in (("The workflow", True), ("Its steps", False)):
            lines = [line for line in self.lines if (line.about is None) is is_of_workflow]
            if lines:
                yield heading, lines


_INTRODUCTION = (
    "A ticked line means the same here, or needs nothing more. Tick each of the others when you have dealt with it.",
    "Another import adds lines at the end, and changes none.",
)
_ENTRY = re.compile(r"^\s*[-*] \[.\] (?P<text>.*\S)\s*$")


@dataclass(frozen=True)
class LedgerChange:
    """What another import does to a ledger.

    Attributes:
        text: of the page; None if it stays as it is.
        added: lines that it gets.
        gone: lines that it has, and that no longer hold.
    """

    text: str | None
    added: tuple[LedgerLine, ...]
    gone: tuple[str, ...]


def merge_ledger(page: str | None, ledger: Ledger) -> LedgerChange:
    """Add the lines that a page lacks at its end. What stands there stays as it is, to the letter.

    Args:
        page: as it is now; None if there is none.
        ledger: of this import.
    """
    if page is None:
        return LedgerChange(ledger.write(), ledger.lines, ())
    present = [match["text"] for line in page.splitlines() if (match := _ENTRY.match(line))]
    known = set(present)
    added = tuple(line for line in ledger.lines if line.text.strip() not in known)
    wanted = {line.text.strip() for line in ledger.lines}
    gone = tuple(text for text in present if text not in wanted)
    if not added:
        return LedgerChange(None, (), gone)
    end = "" if page.endswith("\n") or not page else "\n"
    heading = "" if _ADDED in page else f"\n{_ADDED}\n\n"
    return LedgerChange(f"{page}{end}{heading}" + "".join(f"{line.write()}\n" for line in added), added, gone)


_ADDED = "## Added by a later import"
