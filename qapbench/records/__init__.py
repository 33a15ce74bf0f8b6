"""The files that a run leaves on disk: answers, receipt, scores and record."""
