"""Pruning of a prompt's visual tokens, in front of the decoder and inside it."""
