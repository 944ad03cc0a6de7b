"""The gated recurrence on a GPU: forward, gradients, decode step."""
