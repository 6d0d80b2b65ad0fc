"""Ranks: processes, one for each device, that train together.

    rank 0        reads the command, checks it, prints, and writes what all share
    rank 1, ...   follow it, pass by pass

Alone, a rank has nobody to talk to: every method returns its argument, untouched, so that code
which calls them need not know how many ranks there are.
"""

from sae_lightning.ranks.collectives import ALONE, FOREVER, RankLost, Ranks
from sae_lightning.ranks.meeting import connect, disconnect, world
from sae_lightning.ranks.split import Split

__all__ = ["ALONE", "FOREVER", "RankLost", "Ranks", "Split", "connect", "disconnect", "world"]
