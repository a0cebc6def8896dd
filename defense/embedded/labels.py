"""What the CLIPs that ship choose from where nothing else is said."""

from __future__ import annotations

from defense.hosts.shipped import PHOTO, ShippedClip


def own_labels(model: ShippedClip) -> tuple[str, ...]:
    """Return what a shipped CLIP knows: a thousand names, or the objects that are drawn."""
    if model.name == PHOTO:
        from .photo.names import load_words

        return load_words().names
    from defense.world.scenes import OBJECTS

    return tuple(OBJECTS)
