"""Counts how often each fault was tried and survived, for the table that ends the fault tests."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Tally:
    """Tried and lost attempts by fault."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()

    @contextmanager
    def attempt(self, fault: str, times: int = 1) -> Iterator[None]:
        """One attempt at a fault, or several whose end is judged together; an exception means that it was lost."""
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
            lost = self.lost[fault]
            lines.append(f"{fault:<{width}}  {tried:>5}  {tried - lost:>8}  {lost:>4}")
        return "\n".join(lines)


TALLY = Tally()
