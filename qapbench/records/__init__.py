"""What a run leaves on disk: answers, receipt, scores and the record."""
