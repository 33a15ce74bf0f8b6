"""Training of `smol-llava`, in which a pretrained language model learns to see.

The framework itself never imports this package.
"""
