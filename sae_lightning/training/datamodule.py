"""The LightningDataModule: gives Lightning the stream of activations as its data loader."""

import lightning as L

from sae_lightning.stream.batches import BatchStream
from sae_lightning.stream.source import HeldOutData


class ActivationData(L.LightningDataModule):
    """Batches {site: [batch, d_site]} of activations for training, and held-out data.

    The stream itself is the data loader. It has a length, so Lightning does not prefetch a batch
    and the saved position matches training. Lightning saves its `state_dict` with the loops.
    """

    def __init__(self, stream: BatchStream, held_out: HeldOutData):
        super().__init__()
        self.stream = stream
        self.held_out = held_out

    def train_dataloader(self) -> BatchStream:
        return self.stream
