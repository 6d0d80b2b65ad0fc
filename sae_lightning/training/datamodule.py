"""The LightningDataModule: a stream goes in, a loader comes out."""

import lightning as L

from sae_lightning.stream.batches import BatchStream
from sae_lightning.stream.held_out import HeldOut


class ActivationData(L.LightningDataModule):
    """Batches {site: [batch, d_site]} of LLM activations for training, and held-out ones beside.

    The stream is its own loader. It has a length, so Lightning does not fetch a batch ahead and
    the saved cursor is the one of training; it has `state_dict`, so Lightning saves it within
    its loop and no second copy of the shuffle pool is written.
    """

    def __init__(self, stream: BatchStream, held_out: HeldOut):
        super().__init__()
        self.stream = stream
        self.held_out = held_out

    def train_dataloader(self) -> BatchStream:
        """The stream."""
        return self.stream
