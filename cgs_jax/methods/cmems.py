"""CMEMS-style: one annotated exemplar, copy-paste, and two networks that teach each other.

After "Cross-model mutual learning for exemplar-based medical image segmentation" (En and Guo,
AISTATS 2024, 2404.11812). Certain, from its abstract and opening: two networks of one structure are
trained jointly on the exemplar, synthetic images and unlabelled ones; confident labels of the weak
view teach the other network on the strong view (image level) and on perturbed features (feature
level). That synthetic images are made by pasting moved organs is known from others' descriptions.
The losses below, their weights, the threshold and the synthesis are inferred or ours.

With p_i of network i, w(u) and s(u) the weak and the strong view of an unlabelled image, x_e the
exemplar and x_s a synthetic image, CE and D as everywhere here, and j the other network:

    y_j = argmax p_j(w(u)) and M_j = [max p_j(w(u)) > tau], without gradient
    L_E = sum_i (CE + D)(p_i(x_e), y_e)
    L_S = sum_i (CE + D)(p_i(x_s), y_s), where the label is valid
    L_img = sum_i (CE + D)(p_i(s(u)), y_j), where M_j
    L_fea = sum_i (CE + D)(p_i of perturbed features of w(u), y_j), where M_j
    L = L_E + L_S + lambda(t) (lambda_1 L_img + lambda_2 L_fea)

The paper perturbs features at several levels. Whether one at a time, with a mean over the levels,
is not known; here half of the channels of all levels are dropped at once, in one pass.
"""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cgs_jax.data import tasks
from cgs_jax.methods import augment, base, batches, pseudo_labels, synthesis
from cgs_jax.methods.two_networks import NAMES, TwoNetworks
from cgs_jax.runtime.errors import UserError

TERMS = ("exemplar", "synthetic", "image", "feature")


class Method(TwoNetworks):
    """Copy-paste and consistency between two networks.

    It works on any labelled stream, and is meant for one that repeats a single slice. Of a step's
    labelled images some stay as they are, x_e; the others give their organs to synthetic images.
    Each lies on the labelled image itself, where what is left of the old organs does not count, or
    on an unlabelled weak view. What such a view shows is not known: where either network is sure of
    an organ there, the pixel does not count; elsewhere it is background. With `rim` only pixels
    that are pasted, or so near to them, count there.
    Where images are annotated for some organs only, so are the synthetic ones made of them: the
    other organs may be anywhere in their background (`losses.marginal`).
    """

    def __init__(self, config: ConfigDict, specialists: bool = False):
        super().__init__(config, specialists)
        options, count = config.method, config.batch.labelled
        base.check_terms(options, TERMS)
        synthesis.check(options)
        if options.rim < 0:
            raise UserError(f"method.rim={options.rim} must be at least 0 pixels")
        if not {"exemplar", "synthetic"} & set(options.terms):
            raise UserError("cmems needs 'exemplar' or 'synthetic' in --config.method.terms")
        self.synthetic = "synthetic" in options.terms
        self.consistent = [term for term in ("image", "feature") if term in options.terms]
        if specialists and not self.consistent:
            raise UserError("CGS over cmems needs 'image' or 'feature' in --config.method.terms")
        self.exemplars = round(options.exemplars * count)  # images that stay as they are
        if self.synthetic and not 0 < self.exemplars < count:
            raise UserError(
                f"method.exemplars={options.exemplars} of batch.labelled={count} must leave at "
                "least one image as it is and at least one to be synthetic"
            )
        # The backgrounds among the unlabelled images, spread so that they are on the same device.
        backgrounds = np.arange(count - self.exemplars)
        self.backgrounds = backgrounds * config.batch.unlabelled // max(len(backgrounds), 1)
        # No organ changes sides where left and right differ.
        self.paste = ConfigDict(options.to_dict())
        self.paste.flip = options.flip if config.augment.flip else 0.0

    def views(self, batch, key):
        """As the base class, but of the labelled images all but `exemplars` have become synthetic;
        `batches.split` tells both apart. Of these, 'certain' [B, *S] is True where the label is,
        and 'counts' where it may count at all."""
        k_base, k_where, k_paste, k_jitter = jax.random.split(key, 4)
        views = super().views(batch, k_base)
        if not self.synthetic:
            return views
        exemplar, source = batches.split(views["labelled"], self.exemplars)
        pixels = tuple(range(1, source["label"].ndim))
        ones = (len(source["label"]), *[1] * len(pixels))
        own = jax.random.bernoulli(k_where, self.paste.exemplar_backgrounds, ones)
        unlabelled = views["unlabelled"]["weak"][self.backgrounds]
        background = jnp.where(own[..., None], source["image"], unlabelled)
        image, label, pasted = synthesis.copy_paste(
            k_paste, source["image"], source["label"], background, self.num_targets, self.paste
        )
        # What has nothing pasted stays itself: another view would only be called background.
        empty = ~jnp.any(pasted, pixels, keepdims=True)
        image = jnp.where(empty[..., None], source["image"], image)
        label = jnp.where(empty, source["label"], label)
        if self.config.method.jitter_synthetic:
            image = augment.strong(k_jitter, image, self.config.augment)
        if tasks.ignores(self.config.data):  # pixels are left out that are in the image still
            stays = (empty | (own & ~pasted))[..., None]
            marked = jnp.any(source["annotated"], pixels, keepdims=True)
            source["annotated"] = jnp.where(stays, source["annotated"], marked)
        everywhere = jnp.ones_like(exemplar["label"], bool)
        left = own & (source["label"] > 0) & ~pasted
        counts = empty | (~left & (own | near(pasted, self.config.method.rim)))
        views["labelled"] = batches.join(exemplar, source | {"image": image, "label": label})
        views["certain"] = batches.join(everywhere, empty | own | pasted)
        views["counts"] = batches.join(everywhere, counts)
        return views

    def passes(self, params, state, views, key):
        image, unlabelled = views["labelled"]["image"], views["unlabelled"]
        weak, perturb = unlabelled["weak"], "feature" in self.consistent
        of_labelled, clean, students, model_state = [], [], {"image": [], "feature": []}, {}
        for name, k in zip(NAMES, jax.random.split(key), strict=True):
            k_weak, k_student = jax.random.split(k)
            both, own = self.forward(
                params[name], state.model_state[name], weak, k_weak, perturb=perturb
            )
            outputs, strong, model_state[name] = self.student(
                params[name], own, image, unlabelled["strong"], k_student
            )
            of_labelled.append(outputs)
            clean.append(jax.tree.map(lambda x: x[: len(weak)], both))
            students["image"].append(strong)
            students["feature"].append(jax.tree.map(lambda x: x[len(weak) :], both))
        clean = jax.lax.stop_gradient(clean)
        pairs = [
            base.Pair(student, teacher, share=1 / len(self.consistent))
            for term in self.consistent
            for student, teacher in zip(students[term], clean[::-1], strict=True)
        ]
        labelled = self._labelled(of_labelled, views, clean)
        return base.Passes(labelled, pairs, model_state, state.extra)

    def _labelled(self, outputs, views, clean):
        """Both networks on exemplars and on synthetic images, the latter where they are valid."""
        if not self.synthetic:
            return [base.labelled(x, views) for x in outputs]
        truths = batches.split(views["labelled"], self.exemplars)
        masks = (views["certain"], views["counts"])
        _, (certain, counts) = batches.split(masks, self.exemplars)
        backgrounds = [x.generalist[self.backgrounds] for x in clean]
        masks = None, counts & valid(certain, backgrounds, self.config.method.tau)
        taken = slice(None) if "exemplar" in self.config.method.terms else slice(1, None)
        return [
            base.labelled(part, {"labelled": truth})._replace(where=where)
            for both in outputs
            for part, truth, where in list(
                zip(batches.split(both, self.exemplars), truths, masks, strict=True)
            )[taken]
        ]

    def unsupervised(self, pairs):
        options, terms, cover = self.config.method, {}, {}
        weights = {"image": options.image_weight, "feature": options.feature_weight}
        names = [name for name in self.consistent for _ in NAMES]
        for name, (student, teacher, *_) in zip(names, pairs, strict=True):
            ce, dice, sure = base.confident_loss(student, teacher, options.tau)
            ce, dice = weights[name] * ce, weights[name] * dice
            terms = base.add([terms, {f"unsup/{name}_ce": ce, f"unsup/{name}_dice": dice}])
            label, mask = pseudo_labels.confident(teacher.generalist, options.tau)
            organs = jnp.mean(mask & (label > 0))
            shares = {"cover/sure": sure / len(pairs), "cover/sure_organs": organs / len(pairs)}
            cover = base.add([cover, shares])
        return terms, cover


def near(mask: jax.Array, pixels: int) -> jax.Array:
    """Where `mask` [B, *S] is true, or is so at most so many `pixels` away along rows and columns;
    everywhere with 0."""
    if not pixels:
        return jnp.ones_like(mask)
    window, strides = (*[1] * (mask.ndim - 2), *[2 * pixels + 1] * 2), [1] * mask.ndim
    return jax.lax.reduce_window(mask, False, jax.lax.bitwise_or, window, strides, "SAME")


def valid(certain: jax.Array, logits: list[jax.Array], tau: float) -> jax.Array:
    """Where labels count, bool [B, *S]: where they are `certain`, and where no network is surer
    than `tau` of an organ in the background, by its `logits` [B, *S, 1 + K]."""
    organ = jnp.zeros_like(certain)
    for of_network in logits:
        label, sure = pseudo_labels.confident(of_network, tau)
        organ |= sure & (label > 0)
    return certain | ~organ
