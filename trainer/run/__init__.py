"""A run that survives: its directory, its checkpoints, going on after a stop."""
