"""A loaded model: answers, another merging schedule, and what the model made of a picture."""

import jax
import numpy as np
import pytest

import simvlg_jax
from simvlg_jax.config.load import load_config
from simvlg_jax.decoding.settings import Decoding
from simvlg_jax.evaluation.caption_model import CaptionModel
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.parallel.mesh import make_mesh
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks import params as partition
from simvlg_jax.training.plan import Plan

IMAGES = list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8))
QUESTIONS = ["What is it?", "Why, (so to speak)?", "Is it (red?"]
PUBLISHED = Decoding(num_beams=5, max_new_tokens=10, min_new_tokens=1, length_penalty=0.0)


def config_of(*flags):
    own = ["mesh.data=1", "llm.prompt=so ", "llm.max_text_tokens=60", "evaluate.max_new_tokens=6"]
    return load_config("configs/tiny.py", [f"--config.{flag}" for flag in (*own, *flags)])


@pytest.fixture(scope="module")
def params():
    config = config_of()
    return partition.join(*Plan(build_task(config), config, make_mesh(config.mesh)).init_params())


def model_of(params, *flags, chosen=()) -> CaptionModel:
    config = config_of(*flags)
    return CaptionModel(config, build_task(config), params, chosen)


def written(model, decoding, prompts) -> list[str]:
    """Returns what a captioner writes for each picture alone after a prompt."""
    captioner = Captioner(model.task.model, model.task.batch.texts["caption"].encoder, decoding)
    pairs = zip(IMAGES, prompts, strict=True)
    ids = [np.asarray(captioner(model.params, image[None], prompt).ids) for image, prompt in pairs]
    return [captioner.decode(row)[0][0] for row in ids]


def test_answers_are_decoded_as_published(params):
    model = model_of(params)
    answers = model.answers(IMAGES, QUESTIONS, batch_size=2)
    assert answers == written(model, PUBLISHED, [f"so Question: {question} Short answer:" for question in QUESTIONS])
    assert model.answer(IMAGES[1], QUESTIONS[1]) == answers[1]
    assert model.answers(IMAGES, QUESTIONS[0], batch_size=2)[0] == answers[0]
    with pytest.raises(simvlg_jax.UserError, match="2 questions and 3 pictures"):
        model.answers(IMAGES, QUESTIONS[:2])


def test_answers_follow_the_prompt_the_cleaning_and_the_chosen_decoding_of_the_model(params):
    flags = [
        "data.prompt={} In a word:",
        "data.clean=blip_caption",
        "evaluate.num_beams=2",
        "evaluate.length_penalty=3",
    ]
    model = model_of(params, *flags, chosen={"num_beams"})
    cleaned = ["what is it?", "why, so to speak?", "is it red?"]
    decoding = Decoding(num_beams=2, max_new_tokens=10, min_new_tokens=1, length_penalty=0.0)
    assert model.answers(IMAGES, QUESTIONS) == written(model, decoding, [f"so {each} In a word:" for each in cleaned])


def test_captions_continue_the_prompt_of_the_config(params):
    model = model_of(params, "data.prompt=a red")
    assert model.captions(IMAGES) == written(model, Decoding(max_new_tokens=6), ["so a red"] * 3)
    assert model.captions(IMAGES) == model_of(params).captions(IMAGES, prompt="so a red")


def test_another_merging_schedule_shares_the_parameters(params):
    model, other = model_of(params), model_of(params).with_merging(tokens=5)
    assert all(map(lambda a, b: a is b, jax.tree.leaves(other.params), jax.tree.leaves(params)))
    assert other.captions(IMAGES) == model_of(params, "connector.tokens=5").captions(IMAGES)
    assert other.explain(IMAGES[0], "red").layers[-1].max() + 1 == 5
    assert other.with_merging(merges=[6]).explain(IMAGES[0], "red").layers[-1].max() + 1 == 17 - 6
    for schedule, merges in ((dict(r=2), (2, 2)), (dict(r=4, inflect=-1), (8, 0)), ({}, (0, 0))):
        assert other.with_merging(**schedule).task.model.connector.merges == merges
    with pytest.raises(simvlg_jax.UserError, match="both set the merges"):
        model.with_merging(tokens=5, r=2)
    with pytest.raises(simvlg_jax.UserError, match="17 tokens cannot become 1"):
        model.with_merging(tokens=1)


def test_explanation_has_the_loss_of_each_token_and_the_map_of_each_layer(params):
    model = model_of(params, "data.prompt=a")
    explained = model.explain(IMAGES[0], "red cat")
    assert explained.caption == "red cat"
    assert "".join(text for text, _ in explained.tokens) == " red cat</s>"
    ids, targets = model.task.batch.texts["caption"].encoder("red cat", "a")
    arrays = {"image": IMAGES[0], "caption_ids": ids, "caption_mask": np.ones_like(ids), "caption_targets": targets}
    losses, counts = model.task.evaluation_losses(params, {name: np.asarray([each]) for name, each in arrays.items()})
    assert sum(nats for _, nats in explained.tokens) == pytest.approx(float(losses["caption"][0]), abs=1e-3)
    assert len(explained.tokens) == int(counts["caption"][0])
    assert all(layer.shape == (17,) and layer[0] == 0 for layer in explained.layers)
    assert model.explain(IMAGES[0]).caption == model.caption(IMAGES[0])


def test_likelihood_of_texts_is_the_sum_over_their_tokens(params):
    model = model_of(params, "data.prompt=a")
    (nats, greedy), (again, _) = model.loglikelihoods(IMAGES[:2], None, ["red cat"] * 2, batch_size=2)
    tokens = model.explain(IMAGES[0], "red cat").tokens[:-1]  # without the end token
    assert nats == pytest.approx(-sum(each for _, each in tokens), abs=1e-3) and not greedy
    assert again != nats
    asked = model.loglikelihoods(IMAGES[:1], ["what?"], ["red cat"], batch_size=2)
    same = model_of(params, "data.prompt=Question: what? Short answer:")
    assert asked == same.loglikelihoods(IMAGES[:1], None, ["red cat"], batch_size=2)
