"""Scores of some rows, before their softmax.

`rescore(where, **options) -> Rescore | None` (None: neutral). `rows(step)` names the arrivals whose rows are edited,
`bias(reading)` what is added to their scores.
"""
