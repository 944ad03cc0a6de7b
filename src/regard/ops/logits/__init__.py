"""Site `logits`: a second branch with another prompt, fed the same tokens. Verb `contrast`, returns `Contrast`."""
