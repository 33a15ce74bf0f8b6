"""Questions that cannot be asked of a model, because its processor does not accept their pictures.

They are left out of the run, told one by one, and listed in its record. If they are many, the run stops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qapbench.errors import RunFailedError
from qapbench.tasking.questions import Question
from qapbench.visible import visible_logger

LOG = visible_logger(__name__)
SHARE, FEW = 0.05, 5  # a run may leave out this share of its questions, or this number of them if that is more


def most(questions: int) -> int:
    """Largest number of questions that a run may leave out.

    Args:
        questions: number of questions of the task.
    """
    return max(FEW, int(SHARE * questions))


def note(questions: Sequence[Question], why: Mapping[tuple[str, int], str]) -> None:
    """Note which questions were refused, and tell each that was not told yet.

    Args:
        questions: all questions of a run.
        why: task and document of a refused question -> why.
    """
    for question in questions:
        if question.place in why:
            question.refused = why[question.place]
            LOG.warning("question '%s' is not answered: %s", question.id, question.refused)


def left_out(questions: Sequence[Question]) -> list[Question]:
    """The questions that the model's processor was found to refuse.

    Args:
        questions: all questions of a run.

    Raises:
        RunFailedError: there are more of them than a run may leave out, or nothing is left to ask.
    """
    found = [question for question in questions if question.refused is not None]
    if found and (len(found) > most(len(questions)) or len(found) == len(questions)):
        raise RunFailedError(
            f"the model's processor refuses the pictures of {len(found)} of {len(questions)} questions, and a run may "
            f"leave out {100 * SHARE:g} % or {FEW}; the last is question '{found[-1].id}': {found[-1].refused}"
        )
    return found
