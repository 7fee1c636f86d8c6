"""UniMatch (Yang et al., 2208.09910): two strong views and a perturbed feature stream.

Confident labels of the weak view teach two jittered, CutMixed views, and the weak view itself with
half of its encoder channels dropped. Without the blur of the authors' strong view; CutMix partners
are the rolled batch instead of a second one, labelled in the same pass.
"""

import jax

from cgs_jax.methods import augment, base, batches

SHARES = (0.25, 0.25, 0.5)  # of both strong views and of the perturbed stream


class Method(base.Method):
    """The student teaches itself."""

    mixes = "unlabelled"

    def views(self, batch, key):
        """As the base class, with two strong views and their CutMix boxes 'keep'."""
        k_base, k_second, k_keep = jax.random.split(key, 3)
        views = super().views(batch, k_base)
        weak = views["unlabelled"]["weak"]
        second = augment.strong(k_second, weak, self.config.augment)
        views["unlabelled"]["strong"] = [views["unlabelled"]["strong"], second]
        views["keep"] = [
            augment.cutmix_keep(k, weak.shape[:-1], self.config.method.cutmix)
            for k in jax.random.split(k_keep)
        ]
        return views

    def passes(self, params, state, views, key):
        k_weak, k_strong = jax.random.split(key)
        image = views["labelled"]["image"]
        unlabelled, keep = views["unlabelled"], views["keep"]
        images = batches.join(image, unlabelled["weak"])
        outputs, model_state = self.forward(params, state.model_state, images, k_weak, perturb=True)
        clean, perturbed = (
            jax.tree.map(lambda x, part=part: x[part], outputs)
            for part in (slice(None, len(images)), slice(len(images), None))
        )
        labelled, own = batches.split(clean, len(image))
        own = jax.lax.stop_gradient(own)
        _, perturbed = batches.split(perturbed, len(image))
        strong = (unlabelled["strong"], map(batches.rolled, unlabelled["strong"]))
        strong = map(batches.cutmix, keep, *strong)
        first, second, model_state = self.student(params, model_state, *strong, k_strong)
        mixed = [batches.cutmix(k, own, batches.rolled(own)) for k in keep]
        students, teachers = (first, second, perturbed), (*mixed, own)
        pairs = list(map(base.Pair, students, teachers, [None] * 3, SHARES))
        return base.Passes([base.labelled(labelled, views)], pairs, model_state, state.extra)

    def unsupervised(self, pairs):
        terms = {}
        for name, share, (student, teacher, *_) in zip(
            ("first", "second", "perturbed"), SHARES, pairs, strict=True
        ):
            _, dice, sure = base.confident_loss(student, teacher, self.config.method.tau)
            terms[f"unsup/{name}_dice"] = share * dice
        return terms, {"cover/sure": sure}
