"""The catalogues of all features and neurons: what each fires on, from one pass over text."""
