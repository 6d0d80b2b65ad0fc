"""Features in words, and how well the words predict firing."""
