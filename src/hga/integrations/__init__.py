"""Bindings to model libraries."""
