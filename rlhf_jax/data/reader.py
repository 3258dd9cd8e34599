"""What every place that holds rows is read through: all its rows, none selected yet."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]


class SourceError(ValueError):
    """A row that cannot be read, and where it is."""

    def __init__(self, where: str, reason: str, text: str | None = None) -> None:
        super().__init__(f"{where}: {reason}")
        self.where, self.reason, self.text = where, reason, text


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """All rows of a place, before any are selected."""

    size: int
    get: Callable[[int], Row]
    """Raises SourceError for a row that cannot be read."""
    where: Callable[[int], str]
