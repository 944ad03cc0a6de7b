"""Queries, keys and values before their product.

`prepare(where, **options) -> Prepare | None` (None: neutral). Its functions run on `x [B, heads, T, D]` and
the Step, after rotary positions; keys and values before they are stored, so each may look at its own
token and position only, and cached decoding equals a full forward.
"""
