"""Recipes: what goes where, frozen, checked, saved."""
