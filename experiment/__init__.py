"""One run: its flags, its start, its directory, its checkpoints."""
