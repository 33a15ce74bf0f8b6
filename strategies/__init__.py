"""The built-in strategies: importing this package registers all of them, as any plugin would."""

from . import fusions, metrics, pruners, ptq, quantizers

__all__ = ["fusions", "metrics", "pruners", "ptq", "quantizers"]
