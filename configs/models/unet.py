"""The UNet of the semi-supervised literature."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the options of the UNet over `config`."""
    config.model.channels = (16, 32, 64, 128, 256)  # of each level, finest first
    config.model.dropout = (0.05, 0.1, 0.2, 0.3, 0.5)  # of each level of the encoder
    # pixels share channels until they are this wide; 0: 128 on TPUs, 64 on GPUs, else 1
    config.model.lanes = 0
