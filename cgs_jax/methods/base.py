"""What a training method is. One file a method; `load_by_name` finds it."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cgs_jax import augment, losses, pseudo_labels
from cgs_jax.models import Outputs, build
from cgs_jax.train_state import TrainState

Batch = dict[str, Any]


class Method:
    """Base class: one network, weak and strong views, prediction by the student.

    A subclass defines `loss`, and overrides what it does otherwise. All methods are traced: they
    must be pure functions of their arguments.

    Attributes:
      unlabelled: whether batches hold unlabelled images.
      specialists: whether the network has specialist heads.
      draws: batches of `config.batch` that one step takes.
      start: variables to start from, None to draw them.
    """

    unlabelled = True
    specialists = False
    draws = 1
    start: Any = None

    def __init__(self, config: ConfigDict):
        self.config = config
        self.network = build(config, self.specialists)
        self.num_targets = len(config.data.classes)

    def init(self, key: jax.Array, image: jax.Array) -> tuple[Any, Any, Any]:
        """Returns (params, model_state, extra) for images shaped as `image` [1, H, W, 1]."""
        variables = self.start or self.network.init(key, image, train=False)
        return variables["params"], {"batch_stats": variables["batch_stats"]}, {}

    def views(self, batch: Batch, key: jax.Array) -> Batch:
        """Augments a batch {'labelled': {'image', 'label'}, 'unlabelled': {'image'}}.

        Returns {'labelled': {'image', 'label'}, 'unlabelled': {'weak', 'strong'}}, images
        [B, H, W, 1]; the strong view is the weak one, jittered.
        """
        k_labelled, k_weak, k_strong = jax.random.split(key, 3)
        options = self.config.augment
        image, label = augment.weak(
            k_labelled, batch["labelled"]["image"], batch["labelled"]["label"], options
        )
        views = {"labelled": {"image": image, "label": label}}
        if "unlabelled" in batch:
            weak, _ = augment.weak(k_weak, batch["unlabelled"]["image"], None, options)
            strong = augment.strong(k_strong, weak, options)
            views["unlabelled"] = {"weak": weak, "strong": strong}
        return views

    def loss(
        self, params: Any, state: TrainState, views: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Any, dict[str, jax.Array]]]:
        """Returns (loss, (model_state, extra, metrics)); differentiated by `params`."""
        raise NotImplementedError

    def after_update(self, state: TrainState) -> TrainState:
        """Called after the optimiser, e.g. to move a teacher; `state.step` counts this update."""
        return state

    def predict(self, state: TrainState, image: jax.Array) -> jax.Array:
        """[B, H, W, 1] -> class scores [B, H, W, C] in evaluation mode."""
        params, model_state = self.inference_variables(state)
        outputs = self.network.apply({"params": params, **model_state}, image, train=False)
        if self.config.inference == "specialists":
            return pseudo_labels.merge(jax.nn.softmax(outputs.specialists))
        return jax.nn.softmax(outputs.generalist)

    def inference_variables(self, state: TrainState) -> tuple[Any, Any]:
        """(params, model_state) that `predict` uses: the student's."""
        return state.params, state.model_state

    def forward(
        self, params: Any, model_state: Any, image: jax.Array, key: jax.Array
    ) -> tuple[Outputs, Any]:
        """Forward pass in training mode: dropout on, batch statistics used and collected."""
        return self.network.apply(
            {"params": params, **model_state},
            image,
            train=True,
            rngs={"dropout": key},
            mutable=list(model_state),
        )


def supervised_loss(outputs: Outputs, label: jax.Array) -> dict[str, jax.Array]:
    """CE and Dice of the generalist and, where there are any, the mean over the specialists.

    Returns the terms by name; L_sup is their sum.
    """
    ce, dice = losses.segmentation_loss(outputs.generalist, label)
    terms = {"sup/generalist_ce": ce, "sup/generalist_dice": dice}
    if outputs.specialists is not None:
        relabelled = pseudo_labels.relabel(label, outputs.specialists.shape[0])
        ce, dice = jax.vmap(losses.segmentation_loss)(outputs.specialists, relabelled)
        terms |= {"sup/specialists_ce": jnp.mean(ce), "sup/specialists_dice": jnp.mean(dice)}
    return terms
