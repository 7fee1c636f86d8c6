"""Cross-entropy and Dice over masked pixels, and the ramp of the unsupervised weight.

Equations CE_M and D_M of CGS (Wang et al., IEEE TMI 2025). Both act on logits, channels last.
"""

import jax
import jax.numpy as jnp

DICE_EPS = 1e-10


def segmentation_loss(
    logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and Dice loss of one head against one label map.

    Args:
      logits: [B, H, W, C].
      labels: [B, H, W] integers below C.
      mask: [B, H, W], 1 where a pixel counts; None counts all.

    Returns:
      CE: sum of masked -log p_y over the number of *all* pixels, so a small mask weighs little.
      Dice loss: mean over classes, background included, of 1 - 2 S(p y) / (S(p^2) + S(y^2)) with
      sums S over batch and masked pixels. A class with neither prediction nor label loses nothing.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    probs = jnp.exp(log_probs)
    target = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    if mask is None:
        masked_square = probs**2
    else:
        mask = mask.astype(jnp.float32)[..., None]
        target = target * mask
        masked_square = probs**2 * mask
    ce = -jnp.sum(target * log_probs) / labels.size
    axes = tuple(range(logits.ndim - 1))
    overlap = jnp.sum(target * probs, axes)
    total = jnp.sum(masked_square, axes) + jnp.sum(target, axes)
    dice = 1 - (2 * overlap + DICE_EPS) / (total + DICE_EPS)
    return ce, jnp.mean(dice)


def gaussian_ramp(step: jax.Array, total_steps: int, maximum: float) -> jax.Array:
    """maximum * exp(-5 (1 - t/T)^2): trust pseudo-labels late (Laine and Aila, 1610.02242)."""
    return maximum * jnp.exp(-5.0 * (1.0 - step / max(total_steps, 1)) ** 2)
