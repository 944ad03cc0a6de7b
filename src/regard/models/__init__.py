"""Pretrained models by name, and small whole networks built from layers."""
