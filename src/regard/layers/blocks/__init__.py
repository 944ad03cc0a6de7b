"""Parts that mixers share: short convolutions, norms, positions, heads, and the way into a recurrence."""
