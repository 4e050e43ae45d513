"""ConRad for Blender."""
