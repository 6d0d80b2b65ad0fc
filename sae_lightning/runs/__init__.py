"""From the command line to trained SAEs."""
