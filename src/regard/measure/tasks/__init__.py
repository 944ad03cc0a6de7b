"""Synthetic tasks: rows of tokens with known answers, and a solver of each that reads only the row."""
