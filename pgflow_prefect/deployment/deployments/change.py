"""One difference of a deployment."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One difference of a deployment, with both values in a few words; None for no value."""

    field: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        if self.before is None:
            return f"{self.field}: {self.after}"
        return f"{self.field}: {self.before} -> {self.after or 'none'}"

    def to_json(self) -> dict[str, str | None]:
        """Return the JSON for scripts."""
        return {"field": self.field, "from": self.before, "to": self.after}
