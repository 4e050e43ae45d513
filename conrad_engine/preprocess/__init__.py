"""From a picture file to the object's colors, mask and depth."""
