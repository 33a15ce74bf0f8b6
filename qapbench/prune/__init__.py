"""Prunes the visual tokens of prompts, in front of the decoder or inside it."""
