"""Makes runs: loads the model, answers what is missing, stores the answers, and scores them into records."""

from .execute import run

__all__ = ["run"]
