"""ConRad: constrained radiance fields for 3D generation from a single picture (arXiv:2311.05230)."""

import os

__version__ = "0.1.0"

# Read by OpenMP when torch is first imported. Its default, threads that spin while they wait, makes a CPU job several times
# slower as soon as another program (Blender, say) is busy beside it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
