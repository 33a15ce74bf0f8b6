"""The leaderboard of run records: one offline HTML page, with the same rows as CSV and JSON."""

from .builder import build

__all__ = ["build"]
