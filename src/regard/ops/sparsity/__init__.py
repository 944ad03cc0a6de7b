"""Which keys are read at all, by content, one list for all heads of a layer.

`select(where, **options) -> Select | None` (None: neutral). `choose(reading)` returns pieces of rows with the keys
that each reads, or None: all keys.
"""
