"""Captions that continue prompts: one for all pictures, or one for each."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from simvlg_jax.config.load import load_config
from simvlg_jax.data.batching import pad
from simvlg_jax.decoding.settings import Decoding
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.parallel.mesh import make_mesh
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks import params as partition
from simvlg_jax.training.plan import Plan

PROMPTS = ["", "a red", "Question: what? Short answer:"]


@pytest.fixture(scope="module", params=[False, True], ids=["start after", "start first"])
def captioner_and_params(request):
    flags = ["mesh.data=1", f"llm.start_first={request.param}", "llm.prompt=so ", "llm.max_text_tokens=60"]
    config = load_config("configs/tiny.py", [f"--config.{flag}" for flag in flags])
    task = build_task(config)
    params = partition.join(*Plan(task, config, make_mesh(config.mesh)).init_params())
    return Captioner(task.model, task.batch.texts["caption"].encoder, Decoding(max_new_tokens=6)), params, task


def test_each_picture_may_have_a_prompt_of_its_own(captioner_and_params):
    captioner, params, task = captioner_and_params
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    encoder = task.batch.texts["caption"].encoder
    rows = [encoder.prompt_ids(prompt)[1:] for prompt in PROMPTS]
    ids, mask = pad(rows, 40, encoder.pad_id, left=True), pad([[1] * len(row) for row in rows], 40, 0, left=True)
    together = jax.device_get(captioner(params, images, (ids, mask)).ids)
    for image, row, prompt in zip(images, together, PROMPTS, strict=True):
        alone = captioner(params, image[None], f"so {prompt}").ids
        assert row.tolist() == np.asarray(alone)[0].tolist()
    assert np.asarray(captioner(params, images[:1]).ids)[0].tolist() == together[0].tolist()


def test_program_that_was_prepared_for_shapes_is_the_one_that_captions(captioner_and_params):
    captioner, params, task = captioner_and_params
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    prepared = Captioner(task.model, task.batch.texts["caption"].encoder, Decoding(max_new_tokens=6))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    compile_it = prepared.prepare(shapes, images)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(compile_it).result()
    prepared._jitted = None  # what would compile at the first call
    np.testing.assert_array_equal(prepared(params, images).ids, captioner(params, images).ids)
