"""Which rows a layer runs, and which rows its feed-forward part runs.

`skip(where, **options) -> Rows | None` and `feed(where, **options) -> Feed | None` (None: all rows). A row that
passes a layer by keeps its residual stream and leaves no key and no value there.
"""
