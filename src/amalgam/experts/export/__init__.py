"""Statistics → files for people and for other tools."""
