"""From specs to records: load, answer, store, score."""

from .execute import run

__all__ = ["run"]
