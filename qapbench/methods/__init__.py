"""What a strategy is written against: registries, the six kinds, tokens, formats and quantization arithmetic."""
