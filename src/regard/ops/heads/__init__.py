"""Per-head outputs, before the output projection.

`mix(where, **options) -> Mix | None` (None: neutral). `run(out [B, H, T, Dv], step, state) -> out`; `state`
outlives the forward and follows the rows of the cache.
"""
