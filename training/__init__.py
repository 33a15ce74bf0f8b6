"""Training of the embedded model `diagram-llava`. The framework itself never imports this package."""
