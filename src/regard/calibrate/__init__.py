"""Fitting mechanisms on text: one file a mechanism, its own stem, one function `fit`."""
