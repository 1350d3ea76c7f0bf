"""What compression saves, measured: command lines, one per subject."""
