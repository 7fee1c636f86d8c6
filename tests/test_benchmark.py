"""The benchmark, its PyTorch counterpart, and the compiler's report for TPUs."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgs_jax import aot, benchmark
from cgs_jax.methods import base, cgs, pseudo_labels
from cgs_jax.models import network, torch_weights
from cgs_jax.models.network import Outputs, build
from cgs_jax.runtime import devices
from cgs_jax.runtime.errors import UserError
from cgs_jax.training import train_step
from cgs_jax.training.resolve import resolve
from configs import acdc, segthor

REPOSITORY = pathlib.Path(__file__).parents[1]


def tiny():
    config = acdc.get_config()
    config.data.size = 32
    config.model.update(channels=(4, 8), dropout=(0.1, 0.1))
    config.batch.update(labelled=2, unlabelled=2)
    config.eval_batch = 4
    return config


def test_benchmark_from_the_command_line(tmp_path):
    fields = {"data.size": 32, "model.channels": "(4,8)", "model.dropout": "(.1,.1)"}
    fields |= {"batch.labelled": 2, "batch.unlabelled": 2, "data.root": "none"}
    command = [sys.executable, "-m", "cgs_jax.benchmark", "--config", "configs/acdc.py"]
    command += [f"--config.{k}={v}" for k, v in fields.items()]
    command += ["--seconds=0.3", f"--output={tmp_path / 'out.json'}"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["step"]["blocks_ms"]) >= 3
    assert result["step"]["flops"] > result["step"]["floor_bytes"] > 0
    assert result["without_specialists"]["temporary_bytes"] < result["step"]["temporary_bytes"]
    assert re.search(r"specialists +\S+% time and \+\S+% memory", run.stdout)
    for stage in ("step", "input", "loop"):
        assert result[stage]["ms"] > 0
    assert result["evaluation"]["evaluation_ms"] > 0
    assert result["bound"] in run.stdout


def test_floor_counts_what_convolutions_read_and_write():
    def step(x, kernel):
        x = jnp.sin(x) @ jnp.ones((3, 5))  # 2 x 4 x 4 x (3 + 5) + 15 values
        return jax.lax.conv_general_dilated(  # 2 x 4 x 4 x (5 + 7) + 315 values
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    traced = jax.jit(step).trace(jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 5, 7)))
    expected = 4 * (32 * 8 + 15 + 32 * 12 + 315)
    assert benchmark.convolution_bytes(traced.jaxpr.jaxpr) == expected

    x, square = jnp.ones((4, 4)), 4 * 3 * 16  # bytes of a product of two squares
    product, twice = lambda x: x @ x, lambda x: (x @ x) @ x
    for function, count in (
        (lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, length=5)[0], 5),
        (lambda x: jax.lax.map(product, jnp.stack([x] * 3)), 3),
        (lambda x: jax.lax.cond(x[0, 0] > 0, product, twice, x), 2),  # of branches one runs
        (lambda x: jax.lax.platform_dependent(x, cpu=product, default=product), 1),
        (jax.checkpoint(twice), 2),
        (jax.grad(jax.checkpoint(lambda x: jnp.sum(jnp.sin(x @ x)))), 4),  # one is made again
    ):
        assert benchmark.convolution_bytes(jax.make_jaxpr(function)(x).jaxpr) == count * square


def test_what_bounds_the_step():
    step = {"ms": 10.0, "flops": 8e9, "floor_bytes": 1e9, "bytes": 2e9}
    result = {"device": "1 x gpu", "step": step, "ceilings": {"flops_per_s": 1e12}}
    result["ceilings"]["bytes_per_s"] = 1e12
    assert benchmark.bound(result) == "arithmetic, at 80% of what the device does"
    step["flops"], step["floor_bytes"] = 1e9, 5e9
    assert benchmark.bound(result) == "convolutions' memory, at 50% of what the device does"
    step["floor_bytes"] = 1e9
    assert (
        benchmark.bound(result)
        == "no peak: arithmetic 10%, convolutions' memory 10%, all memory 20%"
    )
    assert benchmark.bound(result | {"input": {"ms": 11.0}}) == "input pipeline"


def test_pytorch_counterpart_computes_the_same_losses():
    torch = pytest.importorskip("torch")
    path = REPOSITORY / "benchmarks" / "torch_cgs.py"
    spec = importlib.util.spec_from_file_location("torch_cgs", path)
    counterpart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counterpart)

    config = tiny()
    network = build(config, specialists=True)
    image = jax.random.uniform(jax.random.key(0), (4, 32, 32, 1))
    variables = jax.jit(network.init)(jax.random.key(1), image)
    model = counterpart.UNet(3, config.model.channels, (0.0, 0.0))
    model.load_state_dict(_renamed(torch, torch_weights.to_torch(variables)), strict=False)
    config.model.dropout = (0.0, 0.0)
    ours, _ = build(config, specialists=True).apply(
        variables, image, train=True, mutable=["batch_stats"]
    )
    generalist, specialists = model(torch.tensor(np.moveaxis(np.asarray(image), -1, 1)))
    theirs = Outputs(
        generalist.detach().movedim(1, -1),
        (torch.stack(specialists).detach().permute(1, 3, 4, 0, 2),),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, theirs)

    def to_torch(outputs):
        generalist, specialists = (torch.tensor(np.asarray(x)) for x in jax.tree.leaves(outputs))
        return generalist.movedim(-1, 1), list(specialists.permute(3, 0, 4, 1, 2))

    rng = np.random.default_rng(0)
    student = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), ours)
    teacher = jax.tree.map(lambda x: np.float32(3 * rng.normal(size=x.shape)), ours)
    label = rng.integers(0, 4, (4, 32, 32))
    terms = base.supervised_loss(base.Labelled(student, jnp.asarray(label)))
    loss = counterpart.supervised(*to_torch(student), torch.tensor(label))
    np.testing.assert_allclose(sum(terms.values()), loss.item(), rtol=1e-5)
    terms, _ = cgs.consistency_losses(student, pseudo_labels.from_teacher(teacher, 0.5))
    labels = counterpart.pseudo_labels(*to_torch(teacher), 0.5)
    loss = counterpart.unsupervised(*to_torch(student), labels)
    np.testing.assert_allclose(sum(terms.values()), loss.item(), rtol=1e-5)


def _renamed(torch, weights):
    """Names of the published checkpoints -> those of the counterpart, heads joined."""
    joined = {}
    patterns = {
        r"encoder\.in_conv\.conv_conv\.": lambda m: "down.0.",
        r"encoder\.down(\d)\.maxpool_conv\.1\.conv_conv\.": lambda m: f"down.{m[1]}.",
        r"decoder\.up(\d)\.conv1x1\.": lambda m: f"reduce.{int(m[1]) - 1}.",
        r"decoder\.up(\d)\.conv\.conv_conv\.": lambda m: f"up.{int(m[1]) - 1}.",
        r"decoder\.out_conv\.": lambda m: "generalist.",
        r"decoder\.projection_heads\.(\d)\.3\.": lambda m: f"last.{m[1]}.",
        r"decoder\.projection_heads\.\d\.([01])\.": lambda m: f"wide.{m[1]}.",
    }
    for name, value in weights.items():
        for pattern, new in patterns.items():
            name = re.sub(pattern, new, name)
        joined.setdefault(name, []).append(torch.tensor(np.ascontiguousarray(value)))
    return {k: torch.cat(v) if k.startswith("wide") else v[0] for k, v in joined.items()}


def test_collectives_are_counted():
    text = """
  %all-reduce.1 = (f32[16]{0}, bf16[3,3,16,32]{3,2,1,0}) all-reduce(%a, %b), replica_groups={}
  %permute = (f32[2,8]{1,0}, f32[2,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%c)
  %done = f32[2,8]{1,0} collective-permute-done(%permute)
  %fusion = f32[8]{0} fusion(%all-reduce.1)"""
    assert aot.collectives(text) == {
        "all-reduce": {"count": 1, "bytes": 16 * 4 + 3 * 3 * 16 * 32 * 2},
        "collective-permute": {"count": 1, "bytes": 64},
    }


def test_traffic_of_a_chips_memory_is_counted():
    """Of a convolution from the chip's memory into on-chip memory, half of whose kernel is fetched
    beforehand: the map, the half, and what the copy writes back."""
    layout = "{1,0:T(8,128)"
    text = f"""
%computation (p: f32[8]) -> f32[8] {{
  %inner = f32[1000]{{0}} negate(%p)
}}

ENTRY %main (x: bf16[64,128], k: f32[16,128]) -> bf16[64,128] {{
  %x = bf16[64,128]{layout}(2,1)}} parameter(0)
  %k = f32[16,128]{layout}}} parameter(1)
  %start = ((f32[16,128]{layout}}}), f32[8,128]{layout}S(1)}}, s32[]{{:S(2)}}) slice-start(%k)
  %half = f32[8,128]{layout}S(1)}} slice-done(%start)
  %y = bf16[64,128]{layout}(2,1)S(1)}} fusion(%x, %half), kind=kOutput, calls=%computation
  %tuple = (bf16[64,128]{layout}(2,1)S(1)}}, f32[8,128]{layout}S(1)}}) tuple(%y, %half)
  %back = (bf16[64,128]{layout}}}, bf16[64,128]{layout}S(1)}}, u32[]{{:S(2)}}) copy-start(%y)
  ROOT %done = bf16[64,128]{layout}(2,1)}} copy-done(%back)
}}"""
    assert aot.memory_traffic(text) == 8 * 128 * 4 + 64 * 128 * 2 + 64 * 128 * 2


@pytest.mark.parametrize(
    "fields",
    [
        {"data.size": 32, "model.channels": (4, 8), "model.dropout": (0.1, 0.1)}
        | {"batch.labelled": 4, "batch.unlabelled": 4},
        pytest.param({}, marks=pytest.mark.slow),
    ],
)
def test_step_compiles_for_a_tpu_that_is_not_here(fields):
    """CGS on 4 x 4 chips of v5e, batch and rows split by 4: it fits, without slow operations."""
    pytest.importorskip("libtpu")
    config = segthor.get_config()
    config.update_from_flattened_dict(fields | {"model.dtype": "bfloat16", "mesh.space": 4})
    result = aot.compile_step(config, "v5e:4x4")
    assert result["devices"] == 16
    assert result["mesh"] == {"data": 4, "space": 4}
    assert result["fits"]
    assert 0 < result["memory_bytes"] < 1e9
    assert result["flops"] > 1e6
    assert 0 < result["traffic_bytes"] < result["bytes"]
    assert result["cycles"] > result["flops"] / (197e12 / 1.5e9)  # not above the chip's peak
    assert result["gathers"] == result["grouped_convolutions"] == 0
    gradients = 4 * 2e6 if not fields else 1000
    assert result["collectives"]["all-reduce"]["bytes"] > gradients
    assert result["collectives"]["collective-permute"]["count"] > 10  # rows of the neighbours


@pytest.mark.parametrize("platform", ["tpu", "gpu", "cpu"])
def test_what_is_chosen_for_another_platform_stays(platform):
    """A step that is compiled for it here, on a CPU, is that of its own machines."""
    model = tiny().model
    network.choose_lowering(model, platform)
    chosen = model.to_dict()
    network.choose_lowering(model, "cpu")
    assert model.to_dict() == chosen
    assert min(model.lanes, model.head_group, model.head_bytes) > 0


def test_what_specialists_cost():
    plain = {"flops": 10, "bytes": 4, "memory_bytes": 200}
    result = {"flops": 11, "bytes": 4, "memory_bytes": 210}
    text = aot.share_of_specialists(result, plain)
    assert text == "specialists +10.0% FLOPs, +0.0% bytes, +5.0% memory"
    without = train_step.without_specialists
    assert without(tiny()).method.terms == ("G_from_g",)
    assert without(without(tiny())) is None
    config = tiny()
    config.inference = "both"
    assert resolve(without(config)).inference == "generalist"
    assert "cgs" not in without(acdc.get_config("method=cgs,base=fixmatch"))


@pytest.mark.parametrize("topology", ["h200:8", "v5e"])
def test_unknown_topology(topology):
    with pytest.raises(UserError, match="--topology|topology v5e"):
        aot.compile_step(tiny(), topology)


def test_the_compiler_knows_our_options(monkeypatch):
    """Those that XLA_FLAGS names, as it does in tests, are left out otherwise."""
    monkeypatch.setenv("XLA_FLAGS", "")
    assert devices.jit(lambda x: x + 1, devices.local_mesh())(1.0) == 2
