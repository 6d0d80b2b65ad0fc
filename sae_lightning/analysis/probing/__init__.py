"""Probes on features and on neurons."""
