"""Pictures and labels in, predictions out."""
