"""The claims of superposition theory, tested on an SAE."""
