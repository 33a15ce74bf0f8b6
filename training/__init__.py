"""Training of the embedded stand-in ``diagram-llava`` (not needed to use the framework)."""
