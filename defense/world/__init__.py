"""The drawn world: scenes, typefaces and emoji. No torch."""
