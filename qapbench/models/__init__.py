"""Model families: where a model's visual tokens, parts and linear layers are."""

from .family import Family, family_of

__all__ = ["Family", "family_of"]
