"""Tensor moves that two or more papers use unchanged, and the store containers."""
