"""Masks: which pairs are allowed, from positions and types alone. Verb: `allow(where, **options) -> Pattern`."""
