"""The leaderboard: one offline HTML page, and the same rows as CSV and JSON, built from run records."""

from .builder import build

__all__ = ["build"]
