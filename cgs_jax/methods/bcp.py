"""Bidirectional copy-paste, BCP (Bai et al., 2305.00673).

A box of an unlabelled image is pasted into a labelled one, and the reverse; the teacher labels the
unlabelled parts, and of each organ only the largest component in a slice counts. For the first
`pretrain` steps labelled images are pasted into labelled ones; then the student starts the teacher.
(The authors pretrain in a run of its own and take its best checkpoint. As in all methods here, the
cross-entropy is divided by the number of all pixels, not of those in the mask, so it weighs half.)
"""

import jax
import jax.numpy as jnp
import optax

from cgs_jax.methods import augment, base, batches, losses, pseudo_labels
from cgs_jax.runtime.errors import UserError


class Method(base.WithTeacher):
    """The student predicts."""

    def __init__(self, config, specialists=False):
        super().__init__(config, specialists)
        if config.batch.labelled % 2 or config.batch.labelled != config.batch.unlabelled:
            raise UserError("bcp: batch.labelled and batch.unlabelled must be the same even number")
        # One step at least, for the teacher to start as the student.
        self.pretrain = max(1, base.steps_of(config, "pretrain"))

    def views(self, batch, key):
        """As the base class, and 'keep' [B, *S], False inside the box of this step."""
        k_base, k_box = jax.random.split(key)
        views = super().views(batch, k_base)
        shape = views["labelled"]["label"].shape
        sizes = jnp.array(shape[1:])
        sides = 2 * sizes // 3
        # The authors' corners stop one short, too.
        corner = jax.random.randint(k_box, sizes.shape, 0, sizes - sides)
        keep = augment.box_keep(jnp.concatenate([corner, sides]), shape[1:])
        views["keep"] = jnp.broadcast_to(keep, shape)
        return views

    def passes(self, params, state, views, key):
        k_student, k_teacher = jax.random.split(key)
        image = views["labelled"]["image"]
        weak = views["unlabelled"]["weak"]
        teacher, extra = self.teacher(state, weak, k_teacher)
        # Even images stand around the box, odd ones in it; while pretraining all around it.
        even = jnp.arange(len(image)).reshape(-1, *[1] * (image.ndim - 2)) % 2 == 0
        pretrains = state.step < self.pretrain
        keep = jnp.where(even | pretrains, views["keep"], ~views["keep"])
        pasted = jnp.where(pretrains, _neighbour(image), weak)
        student, model_state = self.forward(
            params, state.model_state, batches.cutmix(keep, image, pasted), k_student
        )
        own = base.labelled(student, views)
        truth = own.label, own.annotated
        label, annotated = batches.cutmix(keep, truth, jax.tree.map(_neighbour, truth))
        labelled = base.Labelled(student, label, keep | pretrains, annotated)
        pair = base.Pair(student, teacher, ~(keep | pretrains))
        return base.Passes([labelled], [pair], model_state, extra)

    def unsupervised(self, pairs):
        ((student, teacher, where, _),) = pairs
        label = jnp.argmax(teacher.generalist, -1).astype(jnp.uint8)
        label = pseudo_labels.largest_components(label, self.num_targets)
        ce, dice = losses.segmentation_loss(student.generalist, label, where)
        return {"unsup/ce": ce, "unsup/dice": dice}, {}

    def after_update(self, state):
        """The teacher is the student while that pretrains, then its moving average."""
        own = {"params": state.params, "model_state": state.model_state}
        decay = jnp.where(state.step <= self.pretrain, 0, self.config.method.ema_decay)
        return state.replace(extra=optax.incremental_update(own, state.extra, 1 - decay))


def _neighbour(x: jax.Array) -> jax.Array:
    """Each even image swapped with the odd one after it."""
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
