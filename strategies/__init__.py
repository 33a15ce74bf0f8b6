"""The built-in strategies: importing this package registers all of them, as any plugin would."""

from . import allocations, fusions, metrics, pruners, ptq, quantizers

__all__ = ["allocations", "fusions", "metrics", "pruners", "ptq", "quantizers"]
