"""Answers questions of runs: in this process, or by sharing them between workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from qapbench.tasking.questions import Question

from . import refusals
from .active_run import ActiveRun
from .crew import Crew
from .prompt_encoder import first_accepted
from .session import Session
from .sharing import Sharing
from .status import Status
from .sweep import answer_runs
from .threads import using_threads
from .worker import Order, Refused


class WorkerPool:
    """Answers questions for runs of one model and one task.

    Args:
        session: holds the model if this process answers; otherwise only the questions.
        processor: the model's processor.
        threads: threads of each process that answers.
        crew: the workers; None lets this process answer.
        status: is told what fails.
        others: pieces of other work, which are done while workers answer, as far as there is time.

    Attributes:
        peak: largest peak memory of the processes that answered.
    """

    def __init__(
        self,
        session: Session,
        processor: Any,
        threads: int,
        crew: Crew | None,
        status: Status,
        others: deque[Callable[[], None]],
    ) -> None:
        self.session = session
        self.processor = processor
        self.threads = threads
        self.crew = crew
        self.status = status
        self.others = others
        self.peak: dict[str, int] = {}

    def answer(self, active_runs: Sequence[ActiveRun], asked: Sequence[Question] | None) -> None:
        """Answer questions for some of the runs.

        Args:
            active_runs: the runs.
            asked: the questions; all if None.

        Raises:
            RunFailedError: the workers cannot go on, or more questions are refused than a run may leave out.
            NotQuantizedError: a run asks for quantization that never reached a matmul.
        """
        if not active_runs:
            return
        questions = self.session.questions(active_runs[0].spec)
        known = _refused(questions)
        docs = None if asked is None else {question.place[1] for question in asked}
        if self.crew is None:
            with using_threads(self.threads):
                self._note_peak(answer_runs(self.session, active_runs, docs))
            refusals.note(questions, {place: why for place, why in _refused(questions).items() if place not in known})
        else:
            first = first_accepted(questions, self.processor)
            refusals.note(questions, {place: why for place, why in _refused(questions).items() if place not in known})
            for active in active_runs:
                active.open(questions, first)
            wanted = [one for one in questions if docs is None or one.place[1] in docs or one is first]
            sharing = Sharing(self.crew, active_runs, questions, self.session.settings, self.session.progress)
            try:
                sharing.share(self._order(active_runs), wanted, self.status, self.others)
            finally:
                self._note_peak(sharing.peak)
        refusals.left_out(questions)  # all workers together

    def _order(self, active_runs: Sequence[ActiveRun]) -> Order:
        """What workers have to know of the runs."""
        plans = [active.planned for active in active_runs]
        plugins = list(dict.fromkeys(plugin for plan in plans for plugin in plan.spec.plugins))
        return Order(self.session.settings.of_a_worker(), plans, plugins, self.threads)

    def _note_peak(self, peak: dict[str, int]) -> None:
        self.peak |= {name: max(value, self.peak.get(name, 0)) for name, value in peak.items()}


def _refused(questions: Sequence[Question]) -> Refused:
    return {question.place: question.refused for question in questions if question.refused is not None}
