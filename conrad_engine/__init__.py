"""ConRad: constrained radiance fields for 3D generation from a single picture (arXiv:2311.05230)."""

__version__ = "0.1.0"
