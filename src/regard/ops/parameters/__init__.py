"""Model weights, edited once and put back when the recipe is detached.

`edit(where, projections, **options) -> Projections | None` (None: neutral), in float64.
"""
