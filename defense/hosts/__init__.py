"""A CLIP, its residual stream, and a defense in it."""
