"""Held-out scoring that training and analysis share."""
