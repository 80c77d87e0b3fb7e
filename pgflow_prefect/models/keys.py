"""The addresses of tasks and items within a run."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True, slots=True)
class TaskKey:
    """The address of a task within a run. A task is one unit of work of a step.

    Attributes:
        step_slug: the step.
        index: the number of the task within its step; 0 for the only task of a plain step.
    """

    step_slug: str
    index: int = 0

    def __str__(self) -> str:
        """Name it for people. The task of a plain step has the step's name."""
        return repr(self.step_slug) if self.index == 0 else f"{self.step_slug!r}[{self.index}]"

    def as_parameters(self) -> dict[str, object]:
        """Return it as the parameters of a statement."""
        return {"step_slug": self.step_slug, "task_index": self.index}


@dataclass(frozen=True, slots=True)
class ItemKey:
    """The address of an item of a map within a run.

    Attributes:
        step_slug: the map.
        index: the item's place in the array.
    """

    step_slug: str
    index: int

    def __str__(self) -> str:
        """Name it for people."""
        return f"{self.step_slug!r}, item {self.index}"

    def as_parameters(self) -> dict[str, object]:
        """Return it as the parameters of a statement."""
        return {"step_slug": self.step_slug, "item_index": self.index}


def flatten(fields: dict[str, object]) -> dict[str, object]:
    """Return fields as the parameters of a statement: those of the task, and the others."""
    task = fields.pop("task")
    assert isinstance(task, TaskKey)
    return task.as_parameters() | fields
