"""The CLIP for photographs: a small network that sees as EfficientNet-Lite0 does, and reads."""
