"""Cache: which keys and values are kept, and how they are written.

Verbs: `keep(where, **options) -> Pattern` over all KV heads of the layer, and
`encode(where, **options) -> (key Codec or None, value Codec or None)`.
"""
