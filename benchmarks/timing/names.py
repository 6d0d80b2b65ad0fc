"""What the folder and the log of a run are called."""

import re


def name_of(*parts: str) -> str:
    """The parts that are not empty, as one file name: all that tells two runs apart belongs in."""
    return "-".join(re.sub(r"[^\w.=+-]", "_", part) for part in parts if part)
