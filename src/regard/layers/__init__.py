"""Modules with weights of their own, built around the pure functions in `ops`."""
