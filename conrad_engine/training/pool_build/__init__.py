"""Builds the mesh pool that the prior is trained on; needs the extra `training`."""
