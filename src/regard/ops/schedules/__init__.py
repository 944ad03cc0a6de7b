"""Schedules: in which order the exact product is computed. Called: `attend(q, k, v, **options) -> (out, lse)`."""
