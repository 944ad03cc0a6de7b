"""Mixers: a recurrent mechanism with its projections, convolutions, gates and norms (`Mixer`)."""
