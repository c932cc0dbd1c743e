"""Meshes and shardings: presets, shares of a batch, and the sharding of every parameter of a published config."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import AbstractMesh, PartitionSpec

from simvlg_jax.config.load import load_config
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import build_task
from simvlg_jax.training.fingerprints import fingerprint
from simvlg_jax.training.plan import Plan
from simvlg_jax.utils.errors import UserError

GOLDEN = "tests/golden/shardings"
CONFIGS = [
    f"configs/pretrain_image.py:llm={llm},vit={vit}"
    for llm in ("opt2.7b", "opt6.7b", "vicuna7b", "vicuna13b")
    for vit in ("eva_g", "clip_l")
]


def sizes(*flags):
    return load_config("configs/tiny.py", [f"--config.mesh.{flag}" for flag in flags]).mesh


@pytest.mark.parametrize(
    ("preset", "shape"), [("replicated", (8, 1, 1)), ("fsdp", (1, 8, 1)), ("fsdp+tensor", (1, 4, 2)), ("", (8, 1, 1))]
)
def test_preset_fills_all_devices(preset, shape):
    assert tuple(meshes.make_mesh(sizes(f"preset={preset}")).shape.values()) == shape


def test_sizes_multiply_and_one_is_filled_in():
    assert tuple(meshes.make_mesh(sizes("data=2", "fsdp=-1", "tensor=2")).shape.values()) == (2, 2, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["preset=zero"], "mesh.preset is 'zero'; it takes 'replicated', 'fsdp', 'fsdp\\+tensor'"),
        (["preset=fsdp", "tensor=2"], "sets all sizes, but .*'tensor': 2.* leave one out"),
        (["data=0"], "must be positive"),
        (["fsdp=-1"], "at most one -1"),
        (["data=16"], "needs 16 devices and 8 are here"),
    ],
)
def test_impossible_meshes_are_refused(flags, message):
    with pytest.raises(UserError, match=message) as error:
        meshes.make_mesh(sizes(*flags))
    assert error.value.status == 2


@pytest.mark.parametrize(
    ("shape", "owners", "rows"),
    [
        ((8, 1, 1), [0, 0, 0, 0, 1, 1, 1, 1], {0: range(8), 1: range(8, 16)}),
        ((4, 1, 1), [0, 1, 1, 0], {0: (0, 1, 2, 3, 12, 13, 14, 15), 1: range(4, 12)}),  # not neighbours
        ((1, 2, 2), [0, 1, 2, 3], {0: range(8), 1: range(8), 2: range(8, 16), 3: range(8, 16)}),  # pairs read the same
        ((1, 1, 4), [0, 0, 1, 1], {0: range(16), 1: range(16)}),
    ],
)
def test_rows_of_the_batch_follow_from_the_devices(monkeypatch, shape, owners, rows):
    devices = np.array([SimpleNamespace(process_index=owner) for owner in owners]).reshape(shape)
    mesh = SimpleNamespace(devices=devices, shape=dict(zip(meshes.AXES, shape, strict=True)))
    for process, wanted in rows.items():
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert meshes.local_rows(mesh, 16) == tuple(wanted)


def test_frozen_and_trained_weights_have_their_own_placement():
    config = load_config("configs/tiny.py", ["--config.mesh.preset=fsdp+tensor", "--config.mesh.split_frozen=False"])
    mesh = meshes.make_mesh(config.mesh)
    state, frozen = Plan(build_task(config), config, mesh).abstract
    assert all(x.sharding.spec == PartitionSpec(*[None] * x.ndim) for x in jax.tree.leaves(frozen))
    kernel = state.params["connector"]["layer_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor")
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape and x.sharding == kernel.sharding]
    assert len(moments) >= 2 and kernel.dtype == np.float32


def test_fingerprint_changes_with_any_bit_and_not_with_the_placement():
    tree = {
        "a": {"b": jax.random.normal(jax.random.key(0), (8, 6))},
        "c": jax.numpy.arange(5, dtype=jax.numpy.bfloat16),
    }
    mesh = meshes.make_mesh(sizes("preset=fsdp"))
    split = jax.tree.map(lambda x: x, tree)
    split["a"]["b"] = jax.device_put(tree["a"]["b"], jax.NamedSharding(mesh, PartitionSpec("fsdp")))
    whole = fingerprint(tree)
    assert fingerprint(split) == whole
    swapped = tree["a"]["b"].at[0, 0].set(tree["a"]["b"][0, 1]).at[0, 1].set(tree["a"]["b"][0, 0])
    nudged = tree["a"]["b"].at[7, 5].set(np.nextafter(np.float32(tree["a"]["b"][7, 5]), np.float32(9)))
    others = [
        tree | {"a": {"b": swapped}},
        tree | {"a": {"b": nudged}},
        tree | {"a": {"b": tree["a"]["b"].reshape(6, 8)}},
        {"a": tree["a"], "d": tree["c"]},
    ]
    assert len({whole, *map(fingerprint, others)}) == 5


def places(config, mesh):
    """Returns {path: (dtype and shape, mesh axes of each dimension)}."""
    plan = Plan(build_task(config), config, mesh)
    shapes, shardings = (traverse_util.flatten_dict(tree, sep="/") for tree in (plan.shapes, plan.shardings))
    return {
        path: (f"{x.dtype} {list(x.shape)}", ", ".join(axis or "-" for axis in shardings[path].spec))
        for path, x in sorted(shapes.items())
    }


def placements(name):
    """Returns the sharding of every parameter of a config: on 16 chips as in the recipe, and on 2 x 2 x 2 devices."""
    config = load_config(name)
    sizes = [config.mesh[axis] for axis in meshes.AXES]
    recipe = AbstractMesh(tuple(16 // config.mesh.tensor if size == -1 else size for size in sizes), meshes.AXES)
    split = config.copy_and_resolve_references()
    with split.unlocked():
        split.mesh.split_trained = True
    in_recipe, in_split = places(config, recipe), places(split, AbstractMesh((2, 2, 2), meshes.AXES))
    return {path: f"{what} -> {where}; {in_split[path][1]}" for path, (what, where) in in_recipe.items()}


def golden_file(name):
    return f"{GOLDEN}/{name.partition(':')[2].replace(',', '_').replace('=', '_')}.json"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_of_a_published_config_lives_where_it_is_written(name):
    """After an intended change, run `PYTHONPATH=. python tests/test_mesh.py` and read the difference."""
    with open(golden_file(name)) as file:
        assert placements(name) == json.load(file)


def test_only_small_parameters_are_left_whole():
    """Norms, biases and scalars are not split. All of them together are at most a hundredth of the model."""
    for name in CONFIGS:
        config = load_config(name, ["--config.mesh.split_trained=True"])
        total = left = 0
        for what, where in places(config, AbstractMesh((2, 2, 2), meshes.AXES)).values():
            size = np.prod(json.loads(what.split(" ", 1)[1]))
            total += size
            left += size * (not set(where.split(", ")) & set(meshes.AXES))
        assert 0 < left < total / 100, name


if __name__ == "__main__":
    for each in CONFIGS:
        with open(golden_file(each), "w") as file:
            json.dump(placements(each), file, indent=0)
            file.write("\n")
