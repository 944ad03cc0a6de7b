"""Fits a mechanism on text: one file a fitted mechanism, under its stem."""
