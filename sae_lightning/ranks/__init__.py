"""Ranks: the processes of a distributed run, one for each device.

    rank 0        reads and checks the command, prints, and writes the files that all share
    rank 1, ...   train their share of each pass that rank 0 sends

With a single rank, the methods of `Ranks` communicate nothing.
"""

from sae_lightning.ranks.collectives import ALONE, FOREVER, RankLost, Ranks
from sae_lightning.ranks.process_group import connect, disconnect, world
from sae_lightning.ranks.split import FeatureSplit

__all__ = [
    "ALONE",
    "FOREVER",
    "RankLost",
    "Ranks",
    "FeatureSplit",
    "connect",
    "disconnect",
    "world",
]
