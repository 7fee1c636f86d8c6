"""Binary heads whose weights are made from image and prompt (VerSemi, Zeng et al., 2311.11686).

Sizes and layers are those of the released code; of its two outputs the one that it uses. DoDNet has
the same head. The widths 8-8-2 hold 2 (8 8 + 8) + 8 2 + 2 = 162 numbers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cgs_jax.models import packed
from cgs_jax.models.unet import BatchNorm, Conv, conv_init, statistics


class Prompted(nn.Module):
    """A head for every prompt: the first N ask for the organs, the last for the synthetic task.

    A controller, one linear map of the image's bottleneck features and the one-hot prompt, makes
    the weights of three 1x1 convolutions for every image and prompt. The prompt enters nowhere
    else, so one pass of the backbone serves all prompts, and a one-hot input only adds its row of
    the controller's kernel. Chosen here: the one entry of a prompt is not 1 but the root of the
    number of features.

    Attributes:
      num_targets: N.
      width: channels between the convolutions.
    """

    num_targets: int
    width: int = 8

    @nn.compact
    def __call__(
        self, bottleneck: tuple[jax.Array, int], features: tuple[jax.Array, int], train: bool
    ) -> jax.Array:
        """Logits [B, *S, N + 1, 2], class 1 is what the prompt asks for, of the coarsest and the
        finest map of a backbone, each with its pack."""
        prompts, width = self.num_targets + 1, self.width
        context = self._activated(*bottleneck, train, "bottleneck_bn")
        pixels = tuple(range(1, context.ndim - 1))
        context = jnp.mean(context, pixels).reshape(len(context), bottleneck[1], -1).mean(1)
        x, pack = features
        y = self._activated(x, pack, train, "features_bn").astype(x.dtype)
        y, bias = Conv(width, 1, pack, name="reduce")(y)
        planes = packed.unpack_pixels(packed.affine(y, None, bias, pack), pack)
        planes = jnp.moveaxis(planes, -1, 1)  # [B, width, *S], float32: rows fill vectors
        layers = ((width, width), (width, width), (width, 2))
        count, channels = sum(i * o + o for i, o in layers), context.shape[1]
        kernel = self.param("controller_kernel", conv_init, (channels + prompts, count))
        bias = self.param("controller_bias", nn.initializers.zeros, (count,))
        # A one-hot prompt is made as long as the features, about the root of their number. If it
        # were 1, the image would drown it, in the first weights and in what each step of an
        # optimiser changes, and all prompts would be answered alike for hundreds of steps.
        asked = channels**0.5 * kernel[channels:] + bias
        made = context @ kernel[:channels] + asked[:, None]

        def head(made):
            """Weights [B, 162] of one prompt -> its logits [B, 2, *S]."""
            y, start = planes, 0
            for layer, (i, o) in enumerate(layers):
                weight = made[:, start : start + i * o].reshape(-1, i, o)
                start += i * o + o
                y = nn.relu(y) if layer else y
                bias = jnp.expand_dims(made[:, start - o : start], range(2, y.ndim))
                y = jnp.einsum("bio,bi...->bo...", weight, y) + bias
            return y

        # One prompt at a time, computed again for the gradient: hidden maps of one are kept, not of
        # all.
        logits = jax.lax.map(jax.checkpoint(head, prevent_cse=False), made)
        return jnp.moveaxis(logits, (0, 2), (-2, -1))

    def _activated(self, x, pack, train, name):
        """Batch norm and ReLU of a packed map, float32."""
        mean, var = statistics(x, pack) if train else (None, None)
        factor, summand = BatchNorm(name=name)(mean, var, jnp.zeros(x.shape[-1] // pack))
        return nn.relu(packed.affine(x, factor, summand, pack))


def merge(prompts: jax.Array, members: jax.Array | None = None) -> jax.Array:
    """Logits of all prompts [B, *S, N + 1, 2] -> log-probabilities of all classes [B, *S, 1 + N].

    Organ k has what its prompt gives it, background the least that the prompt of any organ gives to
    all else; then the sum is made 1. The synthetic task has no say, and with `members`, bool [N],
    nor has any organ that is none of them.
    """
    log_probs = nn.log_softmax(prompts[..., :-1, :].astype(jnp.float32))
    if members is not None:  # the others are surely not there
        log_probs = jnp.where(members[:, None], log_probs, jnp.array([0, -jnp.inf]))
    background = jnp.min(log_probs[..., 0], -1, keepdims=True)
    return nn.log_softmax(jnp.concatenate([background, log_probs[..., 1]], -1))
