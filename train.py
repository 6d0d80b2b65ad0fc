"""Train a sparse autoencoder: python train.py model.features=10000 loss.l1=1e-3"""

from sae_lightning.commands import run_train

if __name__ == "__main__":
    run_train()
