"""Tiny configurations and batches for single steps."""

import numpy as np

from configs import common


def tiny(method="cgs", size=16, **fields):
    """The published configuration, shrunk."""
    config = common.get_config(*method.split(":"))
    config.data.update(name="acdc", classes=("big", "small"), size=size)
    channels = (4, 4, 8) if "urpc" in method else (4, 8)  # URPC needs three levels
    config.model.update(channels=channels, dropout=(0.1,) * len(channels))
    config.batch.update(labelled=2, unlabelled=0 if method == "supervised" else 2)
    config.total_steps = 60
    config.update_from_flattened_dict(fields)
    return config


def tiny_batch(config, draws=1):
    rng, size = np.random.default_rng(0), config.data.size
    n = 2 * draws
    label = np.zeros((n, size, size), np.uint8)
    label[:, 3:12, 2:9] = 1
    label[:, 5:8, 11:14] = 2
    image = (label * 20000.0 + rng.integers(0, 9000, label.shape)).astype(np.uint16)[..., None]
    return {"labelled": {"image": image, "label": label}, "unlabelled": {"image": image[::-1]}}
