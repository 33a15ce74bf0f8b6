"""Specs: what to run, typed and validated. This is plain data; no model is loaded and no task is read."""
