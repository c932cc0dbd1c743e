"""The model for lmms-eval. Where the harness is not installed, stand-ins take the place of its two classes."""

import importlib
import sys
from collections import namedtuple
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from simvlg_jax.utils.errors import UserError

Request = namedtuple("Request", "args")
PICTURES = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]


class Model:
    """Writes what it was asked."""

    def answers(self, pictures, questions, batch_size):
        return [f"{question} {len(pictures)}/{batch_size}. END more" for question in questions]

    def captions(self, pictures, batch_size):
        return [f"colour {picture.getpixel((0, 0))}" for picture in pictures]

    def loglikelihoods(self, pictures, questions, texts, batch_size):
        assert len(pictures) == len(texts)
        return [(-len(text), question) for text, question in zip(texts, questions or texts, strict=True)]


class Base:
    def __init__(self):
        self.task_dict, self.cache_hook = {}, SimpleNamespace(add_partial=lambda *arguments: None)


@pytest.fixture
def adapter(monkeypatch):
    if importlib.util.find_spec("lmms_eval") is None:
        stand_ins = {
            "lmms_eval.api.instance": {"GenerationResult": namedtuple("GenerationResult", "text")},
            "lmms_eval.api.model": {"lmms": Base},
            "lmms_eval.models.registry_v2": {"ModelManifest": lambda *arguments, **options: (arguments, options)},
        }
        for name, content in stand_ins.items():
            module = ModuleType(name)
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, module)
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.delitem(sys.modules, "simvlg_jax.lmms_eval", raising=False)
    module = importlib.import_module("simvlg_jax.lmms_eval")
    monkeypatch.setattr(module, "load", lambda *arguments, **options: Model())
    yield module
    sys.modules.pop("simvlg_jax.lmms_eval", None)


def requests_of(model, texts, pictures=PICTURES, **settings):
    model.task_dict = {"task": {"test": [[picture] for picture in pictures]}}
    return [Request((text, settings, lambda doc: doc, i, "task", "test")) for i, text in enumerate(texts)]


def test_requests_are_answered_in_batches_and_cut_where_the_task_says(adapter, capsys):
    model = adapter.SimVLG(batch_size="2")
    requests = requests_of(model, ["<image>a?", "b?\n", "c?"], until=["", "END"], max_new_tokens=9)
    assert model.generate_until(requests) == ["a? 2/2.", "b? 2/2.", "c? 1/2."]
    said = capsys.readouterr().err
    model = adapter.SimVLG(context="first_line", batch_size=3)
    assert model.generate_until(requests_of(model, ["a?\nAnswer in a word.", "b?", "c"])) == [
        f"{text} 3/3. END more" for text in ("a?", "b?", "c")
    ]
    assert "the task asks for {'max_new_tokens': 9}" in said and "END" not in said


def test_captions_ignore_the_text_and_see_the_picture_of_the_request(adapter):
    model = adapter.SimVLG(context="ignore")
    colours = ["(255, 0, 0)", "(0, 128, 0)", "(0, 0, 255)"]
    assert model.generate_until(requests_of(model, ["x"] * 3)) == [f"colour {colour}" for colour in colours]


def test_likelihood_is_that_of_the_text_or_of_what_the_task_makes_of_the_document(adapter):
    requests = requests_of(adapter.SimVLG(context="first_line"), ["a?\nChoose."] * 3)
    texts = [" red", "green", lambda document: f"{len(document)} blue"]
    requests = [Request((each.args[0], text, *each.args[2:])) for each, text in zip(requests, texts, strict=True)]
    for context, second in (("first_line", ["a?"] * 3), ("ignore", [" red", "green", "1 blue"])):
        model = adapter.SimVLG(context=context)
        requests_of(model, [])
        assert [each.text for each in model.loglikelihood(requests)] == list(zip([4, 5, 6], second, strict=True))


def test_what_the_model_cannot_do_is_refused(adapter):
    with pytest.raises(UserError, match="context is 'all'; it takes 'question', 'first_line', 'ignore'"):
        adapter.SimVLG(context="all")
    model = adapter.SimVLG()
    with pytest.raises(UserError, match="example 0 of task has str; this model takes one picture"):
        model.generate_until(requests_of(model, ["a"], ["audio"]))
    with pytest.raises(UserError, match="requests without a picture"):
        model.loglikelihood([Request(("", "red"))])
    with pytest.raises(UserError, match="several rounds"):
        model.generate_until_multi_round([])
