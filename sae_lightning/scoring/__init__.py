"""Scores of SAEs on held-out data, which training and analysis share."""
