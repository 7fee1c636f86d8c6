"""TransUNet: ResNet-50 and ViT-B/16 before a decoder of four levels, without weights by AdamW."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the options of TransUNet over `config`."""
    config.model.form = "google"  # as the weights were trained; or 'torch', the published TransUNet
    config.model.units = (3, 4, 9)  # of the three blocks of the ResNet
    config.model.width = 1.0  # of the ResNet; 1: 64 channels after its first convolution
    config.model.groups = 32  # of the group norms
    config.model.hidden = 768  # width of the ViT
    config.model.mlp = 3072  # width inside of its MLPs
    config.model.heads = 12
    config.model.layers = 12
    config.model.decoder = (512, 256, 128, 64, 16)  # channels of the maps, coarsest first
    config.model.dropout = 0.1  # after the position embedding and in the MLPs

    # SGD trains a transformer poorly from random weights. With config.model.weights the published
    # recipe is optimizer.name=sgd, lr=.01, weight_decay=1e-4.
    config.optimizer.name = "adamw"
    config.optimizer.lr = 1e-4
    config.optimizer.weight_decay = 0.01
