"""Measuring a placement of mechanisms on a model: quality, recall, seconds and bytes, always beside dense."""
