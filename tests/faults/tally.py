"""Counts how often each fault was tried and survived, for the table that ends the fault tests."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Tally:
    """Attempts tried and lost, by fault."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()

    @contextmanager
    def attempt(self, fault: str, times: int = 1) -> Iterator[None]:
        """Count one attempt, or several that are judged together. They are lost if an exception is raised within."""
        self.tried[fault] += times
        try:
            yield
        except BaseException:
            self.lost[fault] += times
            raise

    def to_text(self) -> str:
        width = max(map(len, self.tried))
        lines = [f"{'fault':<{width}}  tried  survived  lost"]
        for fault, tried in self.tried.items():
            lines.append(f"{fault:<{width}}  {tried:>5}  {tried - self.lost[fault]:>8}  {self.lost[fault]:>4}")
        return "\n".join(lines)


TALLY = Tally()
