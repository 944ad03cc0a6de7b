"""Training small models from nothing: the loop, its checkpoints, its data."""
