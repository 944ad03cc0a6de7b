"""Words everyone shares: cards, patterns, the store and step protocols, the shape legend, errors."""
