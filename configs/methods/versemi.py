"""VerSemi with the weights of the released code (all 1, no ramp)."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of VerSemi over `config`."""
    # what is learnt beside the class that is drawn for each labelled image: the synthetic task on
    # mixed labelled images, and their own classes there; on mixed unlabelled images the synthetic
    # task from the prompts of all classes, and in the labelled box from its label
    config.method.terms = ("syn", "aux", "agg", "cons")
    config.method.lambda_max = 1.0  # weight of 'agg' and 'cons'
    config.method.ramp = 0.0
    # what the prompts of all classes say teaches the synthetic task and learns nothing from it;
    # False: both learn, as in the released code
    config.method.detach_aggregate = True
    # smallest and largest side of the box of mixed images, as shares of the image's side
    config.method.box = (2 / 3, 2 / 3)  # labelled in labelled
    config.method.box_unlabelled = (0.3, 0.6)  # labelled in unlabelled
    # labelled background is left out where the prompt of a class of another data set is surer than
    # this; 1: it counts everywhere, as in the released code
    config.method.doubt = 0.95
    # True: one Dice loss for all drawn classes together, as in the released code; False: one each
    config.method.pooled_dice = False

    # Adam as in the released code, without decay; a backbone that has AdamW of its own keeps it
    if config.optimizer.name != "adamw":
        config.optimizer.name = "adamw"
        config.optimizer.lr = 1e-3
        config.optimizer.momentum = 0.5
        config.optimizer.weight_decay = 0.0
