"""A backbone brings its own options."""

import jax
import jax.numpy as jnp
import pytest

from cgs_jax import sweep
from cgs_jax.models import network
from cgs_jax.runtime.errors import UserError
from configs import acdc
from steps import tiny


def test_each_backbone_has_its_own_options():
    unet_fields = {*acdc.get_config().model}
    fields = {*acdc.get_config("model=transunet,recipe=patches").model}
    assert unet_fields - fields == {"channels", "lanes"}
    assert acdc.get_config("recipe=patches").optimizer.lr == 0.02
    assert acdc.get_config("model=transunet,recipe=patches").optimizer.lr == 2e-4
    for name, lr in (("unet", 1e-3), ("transunet", 1e-4)):
        assert acdc.get_config(f"method=versemi,model={name}").optimizer.lr == lr
    for name in ("unet", "transunet"):
        config = acdc.get_config(f"model={name}")
        assert (network.backbone(config).levels(config.model), network.stride(config)) == (5, 16)


@pytest.mark.parametrize("depth", [0, 2])
def test_weights_of_the_authors_have_heads_of_one_layer(tmp_path, depth):
    config = tiny(**{"model.head_depth": depth, "model.weights": str(tmp_path / "mine.npz")})
    net, image = network.build(config, specialists=True), jnp.zeros((1, 16, 16, 1))
    variables = jax.eval_shape(net.init, jax.random.key(0), image)
    with pytest.raises(UserError, match="no weights at .*mine.npz"):
        network.backbone(config).load_weights(config.model.weights, variables)
    jnp.savez(config.model.weights, nothing=0)
    with pytest.raises(UserError, match="mine.npz: PyTorch's specialists have model.head_depth=1"):
        network.backbone(config).load_weights(config.model.weights, variables)


def test_sweep_over_backbones(tmp_path):
    """Options of the command line hold for the rows whose backbone has them."""
    rows = tmp_path / "rows.py"
    rows.write_text(
        "def get_sweep(config):\n    return {'a': ('', {}), 'b': ('model=transunet', {})}"
    )
    fields = {"model.lanes": 16, "data.size": 64}
    _, (first, second) = sweep.plan("configs/acdc.py", fields, str(rows), tmp_path / "runs", 1)
    assert first.command[-2:] == ["--config.data.size=64", "--config.model.lanes=16"]
    assert second.command[-2:] == ["configs/acdc.py:model=transunet", "--config.data.size=64"]
    assert second.config.optimizer.name == "adamw"
