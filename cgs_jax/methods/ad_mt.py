"""Alternating diverse mean teachers, AD-MT (Zhao et al., 2311.17325).

Two teachers take turns of random length. In the first's turns the student sees jittered images, in
the second's CutMixed ones, and only that teacher follows it. Both label together, weighted by how
sure they are; where they disagree, a surer student decides. As intended, not as released: the
student's labels are mixed like the teachers', and both teachers copy the student at first. No blur;
boxes as in CGS; partners are the rolled batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cgs_jax.methods import augment, base, batches, pseudo_labels
from cgs_jax.models.network import Outputs


class Method(base.Method):
    """The student predicts."""

    mixes = "unlabelled"

    def __init__(self, config, specialists=False):
        super().__init__(config, specialists)
        self.second = second_is_active(config.seed, config.total_steps)

    def init(self, key, image):
        params, model_state, _ = super().init(key, image)
        own = {"params": params, "model_state": model_state}
        return params, model_state, {"teachers": [jax.tree.map(jnp.copy, own) for _ in range(2)]}

    def views(self, batch, key):
        """As the base class, and 'keep', the CutMix boxes."""
        k_base, k_keep = jax.random.split(key)
        views = super().views(batch, k_base)
        weak = views["unlabelled"]["weak"]
        views["keep"] = augment.cutmix_keep(k_keep, weak.shape[:-1])
        return views

    def passes(self, params, state, views, key):
        k_student, k_teacher = jax.random.split(key)
        image = views["labelled"]["image"]
        weak, strong = views["unlabelled"]["weak"], views["unlabelled"]["strong"]
        second = jnp.asarray(self.second)[state.step]
        keep = views["keep"] | ~second
        strong = jnp.where(second, batches.cutmix(keep, weak, batches.rolled(weak)), strong)

        first, other = state.extra["teachers"]
        pick = lambda a, b: jax.tree.map(lambda a, b: jnp.where(second, b, a), a, b)  # noqa: E731
        active, idle = pick(first, other), pick(other, first)
        teachers = [
            self.forward(active["params"], active["model_state"], weak, k_teacher)[0],
            self.network.apply({"params": idle["params"], **idle["model_state"]}, weak),
        ]
        labelled, unlabelled, model_state = self.student(
            params, state.model_state, image, batches.join(weak, strong), k_student
        )
        own, student = batches.split(unlabelled, len(weak))
        teacher = jax.lax.stop_gradient(together(*teachers, own))
        teacher = batches.cutmix(keep, teacher, batches.rolled(teacher))
        pair = base.Pair(student, teacher)
        return base.Passes([base.labelled(labelled, views)], [pair], model_state, state.extra)

    def unsupervised(self, pairs):
        ((student, teacher, *_),) = pairs
        _, dice, sure = base.confident_loss(student, teacher, self.config.method.tau)
        return {"unsup/dice": dice}, {"cover/sure": sure}

    def labelling_variables(self, state):
        """Those of one of the two teachers."""
        teacher = state.extra["teachers"][0]
        return teacher["params"], teacher["model_state"]

    def after_update(self, state):
        """The teacher whose turn it was follows the student, batch statistics included."""
        step, decay = state.step - 1, self.config.method.ema_decay
        decay = jnp.where(step < 100, 0, jnp.minimum(1 - 1 / jnp.maximum(step // 2 - 49, 1), decay))
        own = {"params": state.params, "model_state": state.model_state}
        second = jnp.asarray(self.second)[step]
        teachers = [
            optax.incremental_update(
                own, teacher, jnp.where((second == i) | (step < 100), 1 - decay, 0)
            )
            for i, teacher in enumerate(state.extra["teachers"])
        ]
        return state.replace(extra={"teachers": teachers})


def second_is_active(seed: int, total_steps: int) -> np.ndarray:
    """By step, whether it is the second teacher's turn; turns last 1 to 50 steps."""
    lengths = np.random.RandomState((seed, 2)).randint(1, 51, total_steps + 1)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)[: total_steps + 1]


def together(first: Outputs, second: Outputs, student: Outputs) -> Outputs:
    """What both teachers say, as logits: means weighted by exp(-entropy), in bits, of generalists.

    Where their labels differ and the student, with another label, is surer: what that one says.
    """
    probs = [jax.nn.softmax(x.generalist.astype(jnp.float32)) for x in (first, second)]
    entropy = [-jnp.sum(p * jnp.log2(p + 1e-10), -1) for p in probs]
    share = jax.nn.softmax(-jnp.stack(entropy), 0)[..., None]
    mean = share[0] * probs[0] + share[1] * probs[1]
    own = jax.nn.softmax(student.generalist.astype(jnp.float32))
    labels = [jnp.argmax(p, -1) for p in (*probs, mean, own)]
    surer = jnp.max(own, -1) > jnp.max(mean, -1)
    decides = (labels[0] != labels[1]) & (labels[3] != labels[2]) & surer
    generalist = jnp.log(jnp.where(decides[..., None], own, mean) + 1e-10)
    if first.specialists is None:
        return Outputs(generalist, None)
    first, second, own = map(pseudo_labels.specialist_probs, (first, second, student))
    mean = share[0][..., None] * first + share[1][..., None] * second
    merged = jnp.log(jnp.where(decides[..., None, None], own, mean) + 1e-10)
    return Outputs(generalist, (merged,))
