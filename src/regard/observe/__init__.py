"""Seeing what attention does, at any length: `observe.record(model, inputs)` and what is read beside it."""

from regard.observe.record import READINGS, Record, Sinks, record
from regard.observe.roles import THRESHOLDS, Roles, ablated, roles
from regard.observe.saliency import Saliency, saliency
from regard.observe.tracing import Recovery, noised, trace
from regard.ops.totals import mass

__all__ = [
    "READINGS",
    "THRESHOLDS",
    "Record",
    "Recovery",
    "Roles",
    "Saliency",
    "Sinks",
    "ablated",
    "mass",
    "noised",
    "record",
    "roles",
    "saliency",
    "trace",
]
