"""Tasks and their questions. All code that uses lm-eval's tasks is here."""
