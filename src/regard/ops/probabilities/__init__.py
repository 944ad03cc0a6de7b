"""Attention probabilities, as gains on segments of the keys.

`reweigh(where, **options) -> Reweigh | None` (None: neutral). `split(reading)` names a segment for every key,
`gains(masses)` what each segment's probability is multiplied by; probabilities are never built.
"""
