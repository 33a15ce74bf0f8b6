"""The tasks that come with qapbench. Importing this package registers them, as importing a plugin does."""

from .diagramqa import utils as diagramqa
from .scienceqa import utils as scienceqa

__all__ = ["diagramqa", "scienceqa"]
