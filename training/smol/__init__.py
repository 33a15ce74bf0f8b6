"""Training of `smol-llava`: a pretrained language model that learns to see (not needed to use the framework)."""
