"""Site `tokens`: tokens that leave the request at some layer.

Verb `drop(where, ...) -> Rows`: the rows that go on in this layer. A row that left never comes back, so what a
layer drops, all later ones drop too.
"""
