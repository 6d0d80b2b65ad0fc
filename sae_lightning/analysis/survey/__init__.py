"""What features and neurons fire on: one pass over text, and what it adds up to."""
