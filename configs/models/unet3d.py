"""The UNet for volumes: training sees windows of `data.depth` slices."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the options of the UNet for volumes over `config`."""
    config.model.channels = (16, 32, 64, 128)  # of each level, finest first
    config.model.dropout = (0.05, 0.1, 0.2, 0.3)  # of each level of the encoder
    # whether slices, too, are halved from each level to the next, 2, or not, 1: then the kernels
    # before that are 1 x 3 x 3. Where slices are thick begin with 1: (1, 2, 2)
    config.model.depth_strides = (2, 2, 2)

    config.data.depth = 16
    config.batch.labelled, config.batch.unlabelled = 2, 2  # volumes
    config.eval_batch = 4
