"""What the parts of a layer add to the residual stream, before it is added.

`write(where, **options) -> Write | None` (None: nothing happens in this layer). `run(part, x [B, T, d], step)`
returns what the part ("attention" or "feed_forward") adds instead.
"""
