"""What the process that gives out work has to know of workers, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .partition import Unit
from .worker import Failure, Order, Part


@dataclass(frozen=True)
class Event:
    """What was heard of a worker.

    Attributes:
        worker: name of the worker.
        where: what a user calls it.
        unit: the unit that it had; None if it had none.
        found: answers, a failure, or None if the unit is done.
        lost: whether the worker is gone; `found` is then the failure that says why.
    """

    worker: str
    where: str
    unit: Unit | None
    found: Part | Failure | None
    lost: bool = False


class Crew(Protocol):
    """Workers that take units and answer with events. They are kept from one order to the next."""

    @property
    def size(self) -> int:
        """Number of workers that there are, or will be soon."""
        ...

    @property
    def again(self) -> bool:
        """Whether another worker can do what one failed at."""
        ...

    @property
    def device(self) -> str | None:
        """Name of the device that the workers compute on; None if it is that of this process."""
        ...

    def prepare(self, threads: int) -> None:
        """Begin to start workers, which takes seconds, and do not wait for them. An order comes soon.

        Args:
            threads: number of torch's threads that each is going to have.
        """
        ...

    def take(self, order: Order) -> None:
        """Give an order to every worker that there is or will be. None of them has a unit."""
        ...

    def idle(self) -> Sequence[str]:
        """The workers that wait for a unit."""
        ...

    def give(self, worker: str, unit: Unit) -> None:
        """Give a unit to a worker that waits for one."""
        ...

    def events(self, seconds: float) -> Sequence[Event]:
        """What was heard of workers; waits that long for the first.

        Raises:
            UserError: a worker cannot work as it should, and another would not either.
            RunFailedError: no worker is left.
        """
        ...

    def close(self) -> None:
        """End all workers."""
        ...
