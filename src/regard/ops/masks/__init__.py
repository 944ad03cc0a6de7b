"""Masks: which pairs are allowed, from positions and types alone.

`allow(where, **options) -> Pattern` is bound to a layer; `pattern(grid or spans, **options) -> Pattern` and
`attend(q, k, v, **options) -> (out, lse)` are called.
"""
