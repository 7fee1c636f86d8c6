"""Cross-entropy and Dice over masked pixels, and the ramp of the unsupervised weight.

Equations CE_M and D_M of CGS (Wang et al., IEEE TMI 2025). Both act on logits, channels last.
"""

import jax
import jax.numpy as jnp

DICE_EPS = 1e-10
NEVER = -1e9  # a logit whose probability is 0


def segmentation_loss(
    logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and Dice loss of one head against one label map.

    Args:
      logits: [B, *S, C], with any spatial axes *S.
      labels: [B, *S] integers below C.
      mask: [B, *S], 1 where a pixel counts; None counts all.

    Returns:
      CE: sum of masked -log p_y over the number of *all* pixels, so a small mask weighs little.
      Dice loss: mean over classes, background included, of 1 - 2 S(p y) / (S(p^2) + S(y^2)) with
      sums S over batch and masked pixels. A class with neither prediction nor label loses nothing.
    """
    logits = jnp.moveaxis(logits, -1, 0).astype(jnp.float32)  # a plane a class: rows fill vectors
    log_probs = jax.nn.log_softmax(logits, 0)
    probs = jnp.exp(log_probs)
    classes = jnp.arange(len(logits), dtype=labels.dtype).reshape(-1, *[1] * labels.ndim)
    target, counted = labels == classes, True
    if mask is not None:
        counted = mask.astype(bool)
        target &= counted

    def total(x, where):
        return jnp.sum(jnp.where(where, x, 0.0), tuple(range(1, x.ndim)))

    ce = -jnp.sum(total(log_probs, target)) / labels.size
    overlap = total(probs, target)
    sizes = total(probs * probs, counted) + total(jnp.ones_like(probs), target)
    return ce, jnp.mean(1 - (2 * overlap + DICE_EPS) / (sizes + DICE_EPS))


def marginal(logits: jax.Array, annotated: jax.Array) -> jax.Array:
    """Logits of images that are annotated for some of the organs only.

    What is not annotated may lie anywhere in the labelled background, so its probability is added
    to that of the background and it is never predicted itself (marginal loss, Shi et al.,
    2007.03868).

    Args:
      logits: [..., 1 + K].
      annotated: [..., K], False for an organ that is not annotated.
    """
    organs = logits[..., 1:].astype(jnp.float32)
    hidden = jnp.where(annotated, NEVER, organs)
    hidden = jnp.concatenate([logits[..., :1].astype(jnp.float32), hidden], -1)
    background = jax.nn.logsumexp(hidden, -1, keepdims=True)
    return jnp.concatenate([background, jnp.where(annotated, organs, NEVER)], -1)


def gaussian_ramp(step: jax.Array, total_steps: int, maximum: float) -> jax.Array:
    """maximum * exp(-5 (1 - t/T)^2), `maximum` after T: trust pseudo-labels late (Laine and Aila,
    1610.02242)."""
    total_steps = max(total_steps, 1)
    return maximum * jnp.exp(-5.0 * (1.0 - jnp.minimum(step, total_steps) / total_steps) ** 2)
