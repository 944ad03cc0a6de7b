"""Softmax attention on a GPU."""
