"""Model families: one file each. Every module of this folder is imported, so adding a family is adding a file."""

import importlib
import pkgutil

from .family import Family, family_of

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Family", "family_of"]
