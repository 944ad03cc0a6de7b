"""Fitting mechanisms on text: one file a mechanism, its own stem; `fit` where tensors of its card come out."""
