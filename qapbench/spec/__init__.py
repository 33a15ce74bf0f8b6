"""What to run, typed and validated: pure data, no model is loaded and no task is read."""
