"""ScienceQA's part of the shared multiple-choice task: nothing of its own but where lm-eval looks for it."""

from qapbench.tasks.multichoice import dataset

__all__ = ["dataset"]
