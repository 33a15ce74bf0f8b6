"""What a strategy is written against: registries, the five kinds, tokens, formats and quantization arithmetic."""
