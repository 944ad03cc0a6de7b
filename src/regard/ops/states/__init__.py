"""The product of queries, keys and values, replaced by a state: `scan(q, k, v, ...) -> (out, state)`."""
