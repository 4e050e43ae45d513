"""The wire protocol. In a checkout this is the engine's folder; build_addon.py puts a copy of it in this place."""

from conrad_engine.protocol import *  # noqa: F403
from conrad_engine.protocol import __all__  # noqa: F401
