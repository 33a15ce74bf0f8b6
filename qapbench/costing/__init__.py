"""What a compressed model costs, from its config alone: tokens per layer, FLOPs, bits, bytes, and bounds on time."""
