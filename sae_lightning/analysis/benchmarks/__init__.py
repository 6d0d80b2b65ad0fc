"""Benchmarks of the field, each beside its controls."""
