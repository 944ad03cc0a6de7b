"""Losses on attention and on the residual stream, to be added to a model's own.

`penalty(..., **options)` is called: it takes masses or states with gradients, and returns a number with gradients.
"""
