"""What model and attention plugins are written with: `engine.layers`, by the door for plugins. Imports torch."""

from engine.layers import *  # noqa: F403
from engine.layers import __all__ as __all__
