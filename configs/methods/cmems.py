"""CMEMS-style. No value is from the paper, whose full text was not at hand."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of CMEMS-style over `config`."""
    config.method.tau = 0.95  # confidence that pseudo-labels need
    config.method.lambda_max = 1.0  # weight of the unsupervised loss at the end of the ramp
    config.method.image_weight = 1.0  # in it, of the strong view (lambda_1)
    config.method.feature_weight = 1.0  # in it, of the perturbed features (lambda_2)
    # the losses L_E, L_S, L_img and L_fea; without 'synthetic' all labelled images stay as they are
    config.method.terms = ("exemplar", "synthetic", "image", "feature")
    config.method.predicts = "first"  # the first network; or the 'mean' of both

    # share of the labelled images that stay as they are; with as many labelled as unlabelled ones
    # they are a quarter of the student's pass, and parts of them are in the synthetic ones
    config.method.exemplars = 0.5
    # probability that organs are pasted on the image that they are from, not on an unlabelled one
    config.method.exemplar_backgrounds = 0.5
    # on an unlabelled image only what is pasted counts, and so many pixels around it; 0: all of it
    # counts where no network is sure of an organ
    config.method.rim = 0
    config.method.jitter_synthetic = True  # brightness and contrast of whole synthetic images
    # False: all organs of an image move as one; True: each moves on its own, and may cover another
    config.method.per_organ = False
    config.method.rotation = 20.0  # by at most so many degrees
    config.method.scale = (0.8, 1.2)
    config.method.shift = 0.1  # by at most this share of the image's sides
    config.method.flip = 0.5  # probability of a mirror image; none where augment.flip is 0
    config.method.jitter = 0.2  # brightness and contrast of the organs by factors within 1 +- this
