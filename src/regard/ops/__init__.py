"""Exact attention, and one folder a site for the papers' mechanisms."""
