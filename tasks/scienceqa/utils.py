"""The task `scienceqa`. Everything but its name is shared with other tasks, in `tasks/multichoice.py`."""

from typing import Any

from qapbench.tasking.registry import task
from qapbench.tasks import multichoice


@task("scienceqa")
def dataset(**options: Any) -> dict[str, multichoice.Docs]:
    """ScienceQA (Lu et al., NeurIPS 2022): 4,241 multiple-choice questions of the test split, half with an image."""
    return multichoice.dataset(**options)
