"""Exact softmax attention on a GPU: over lists of blocks, and over caches."""
