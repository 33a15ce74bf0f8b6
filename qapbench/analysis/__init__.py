"""What is made of results: scores, intervals, comparisons, studies, tables and pictures."""
