"""Site `logits`: branches with another prompt, other images or weights. Verb `contrast`, returns `Contrast`."""
