"""Published benchmarks, in which an SAE is scored beside its controls."""
