"""Folders on disk whose every byte is accounted for: defenses and SAEs."""
