"""Tasks and their questions: everything that knows lm-eval."""
