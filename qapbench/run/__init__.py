"""From specs to records: load, answer, store, score."""

from .engine import run

__all__ = ["run"]
