"""SAEs on disk: the saved format, and those of other tools."""
