"""Mixtures: proportions, exact resume, any number of processes, and what a config may say."""

import json
from collections import Counter

import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_data_pipeline import Numbered, assert_equal, captions, config, readable, take, train

from simvlg_jax.config import saved
from simvlg_jax.config.load import fill, load_config
from simvlg_jax.data.mixture import Mixture, Part, load_training
from simvlg_jax.data.skipped import Skipped
from simvlg_jax.data.sources import load_source
from simvlg_jax.data.sources.share import Share
from simvlg_jax.utils.errors import UserError

SIZES = {"laion": 300, "ccs": 90, "coco": 30}
WEIGHTS = {"laion": 15, "ccs": 4, "coco": 1}


class Named(Numbered):
    """The caption is the number of the record after that of its source."""

    def __init__(self, base, count, damaged=()):
        super().__init__(count, damaged)
        self.base = base

    def __getitem__(self, index):
        return super().__getitem__(index) | {"caption": str(self.base + int(index))}


def mixture(damaged=()):
    parts = [
        Part(name, WEIGHTS[name], Named(1000 * place, size, damaged), config())
        for place, (name, size) in enumerate(SIZES.items())
    ]
    return Mixture(parts)


def drawn(source, count, **options):
    return [number for batch in take(train(source=source, **options), count) for number in readable(batch)]


def test_any_run_of_examples_has_the_weights_proportions():
    examples = drawn(mixture(), 50, batch_size=20)
    for start in range(0, 1000, 20):
        assert Counter(number // 1000 for number in examples[start : start + 20]) == {0: 15, 1: 4, 2: 1}


def test_each_part_has_whole_epochs_of_its_own_order():
    examples = drawn(mixture(), 60, batch_size=20)
    for place, size in enumerate(SIZES.values()):
        part = [number - 1000 * place for number in examples if number // 1000 == place]
        epochs = [part[start : start + size] for start in range(0, len(part) - size + 1, size)]
        assert epochs and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert all(epoch != epochs[0] for epoch in epochs[1:])


def test_parts_of_the_same_data_have_orders_of_their_own():
    parts = [Part(name, 1, Named(place * 1000, 40), config()) for place, name in enumerate("ab")]
    examples = drawn(Mixture(parts), 10)
    first, second = ([number % 1000 for number in examples if number // 1000 == place] for place in range(2))
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_is_exact(workers):
    data = config(workers=workers)
    straight = train(data, mixture())
    take(straight, 7)
    state = json.loads(json.dumps(straight.get_state()))
    rest = take(straight, 5)
    straight.close()
    resumed = train(data, mixture())
    resumed.set_state(state)
    assert_equal(take(resumed, 5), rest)
    resumed.close()


def test_batches_are_the_same_for_any_number_of_processes():
    whole = take(train(config(pad_multiple=0), mixture()), 4)
    for rows in (range(4), (6, 1)):
        part = take(train(source=mixture(), rows=rows), 4)
        assert_equal(part, [{key: value[list(rows)] for key, value in batch.items()} for batch in whole])


def test_skipped_records_are_named_with_their_part(capsys):
    skipped = Skipped()
    drawn(mixture(damaged={3}), 60, batch_size=20, skipped=skipped)
    assert skipped.count >= 6 and "skipped record 3 of laion, 'picture 3': not a picture" in capsys.readouterr().err


def test_mixture_is_a_source_of_all_records():
    source = mixture()
    assert len(source) == 420
    assert [source[i]["caption"] for i in (0, 299, 300, 389, 390, 419)] == ["0", "299", "1000", "1089", "2000", "2029"]
    assert source.info(300).id == "picture 0"
    with pytest.raises(IndexError):
        source[420]


def test_batch_may_be_larger_than_a_part_but_not_than_the_sum():
    next(train(source=mixture(), batch_size=400))
    with pytest.raises(UserError, match=r"420 examples, less than one batch of 421: lower train\.batch_size"):
        train(source=mixture(), batch_size=421)


def write_folder(folder, name):
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    lines = [{"image": "a.png", "caption": f"A {name}!", "split": split} for split in ("train", "val")]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def test_entries_take_what_they_do_not_name_from_the_data_config(tmp_path):
    data = load_config("configs/tiny.py").data
    with data.unlocked():
        data.name, data.clean = "folder", "blip_caption"
        data.mixture = ConfigDict(
            {
                "one": {"path": write_folder(tmp_path / "1", "cat"), "weight": 3},
                "two": {"path": write_folder(tmp_path / "2", "dog"), "clean": "", "split": "val", "prompt": "a photo:"},
                "three": {"name": "synthetic", "crop_scale": (0.25, 0.5)},
            }
        )
    source = load_training(data)
    assert [(part.name, part.weight) for part in source.parts] == [("one", 3), ("three", 1.0), ("two", 1.0)]
    one, three, two = (part.source[0] for part in source.parts)
    assert (one["caption"], two["caption"], two["prompt"]) == ("a cat", "A dog!", "a photo:")
    assert "prompt" not in one and three["caption"].startswith("a")
    assert source.parts[1].config.crop_scale == (0.25, 0.5) and source.parts[0].config.crop_scale == data.crop_scale
    texts = captions(next(train(data, source, batch_size=5)))
    assert texts.count("a cat") == 3 and "a photo: A dog!" in texts


def test_error_of_a_source_names_its_entry(tmp_path):
    data = load_config("configs/tiny.py").data
    with data.unlocked():
        data.mixture = ConfigDict({"coco": {"name": "folder", "path": str(tmp_path / "none")}})
    with pytest.raises(UserError, match=r"data\.mixture\.coco: .*none is not a folder"):
        load_training(data)


FILE = """
from simvlg_jax.config import defaults
from ml_collections import ConfigDict
def get_config():
    config = defaults.get_config()
    config.data.name = "synthetic"
    config.data.mixture = ConfigDict(%s)
    return config
"""


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("dict(a=dict(wieght=1))", "unknown config key data.mixture.a.wieght; it takes weight, split, "),
        ("dict(a=dict(workers=1))", "unknown config key data.mixture.a.workers"),
        ("dict(a=dict(weight=0))", "data.mixture.a.weight is 0; it takes a number of examples above 0"),
        ("dict(a=dict(weight='1'))", "data.mixture.a.weight is '1'"),
        ("dict(a=dict(weight=True))", "data.mixture.a.weight is True"),
        ("dict(a=3)", "data.mixture.a is 3; it takes keys such as weight, name and path"),
        ("dict(a=dict(shuffle='rows'))", "data.mixture.a.shuffle is 'rows'; it takes 'global', 'blocks'"),
        ("dict(a=dict(block_size=0))", "data.block_size is 0; it must be at least 1"),
        ("dict(a=dict(prompt='{} {}'))", "data.mixture.a.prompt is '{} {}'; it takes at most one {}"),
    ],
)
def test_entries_that_mean_nothing_are_refused(tmp_path, entries, message):
    path = tmp_path / "mixed.py"
    path.write_text(FILE % entries)
    with pytest.raises(UserError) as raised:
        load_config(str(path))
    assert message in str(raised.value) and raised.value.status == 2


def test_mixture_is_saved_with_a_run_and_overridden_by_flags(tmp_path):
    path = tmp_path / "mixed.py"
    path.write_text(FILE % "dict(a=dict(weight=2), b=dict(weight=1.5, split='val'))")
    mixed = load_config(str(path), ["--config.data.mixture.a.weight=5"])
    saved.save_config(mixed, tmp_path)
    again = saved.read_config(tmp_path)
    assert again.data.mixture.to_dict() == {"a": {"weight": 5}, "b": {"weight": 1.5, "split": "val"}}
    assert not saved.differences(again, fill(mixed), lambda key: True)
    assert [part.weight for part in load_training(again.data).parts] == [5, 1.5]


@pytest.mark.parametrize(
    ("llm", "weights"),
    [("opt2.7b", {"laion115M": 15, "ccs14M": 4, "coco": 1}), ("vicuna7b", {"ccs14M": 45, "coco": 5})],
)
def test_recipes_have_the_published_mixtures(llm, weights):
    config = load_config(f"configs/pretrain_image.py:llm={llm}", ["--config.data.mixture.coco.path=elsewhere"])
    entries = config.data.mixture.to_dict()
    assert {name: entry["weight"] for name, entry in entries.items()} == weights
    assert {entry["name"] for entry in entries.values()} == {config.evals.val.data.name} == {"prepared"}
    paths = {name: f"data/{name}" for name in weights} | {"coco": "elsewhere"}
    assert {name: entry["path"] for name, entry in entries.items()} == paths
    assert config.evals.val.data.path == "data/coco" and config.data.clean == "blip_caption"
    assert not load_config(f"configs/pretrain_image.py:llm={llm},data=own").data.mixture


@pytest.mark.parametrize(("count", "share", "expected"), [(10, 0.3, [0, 3, 6]), (4, 0.01, [0]), (3, 0.999, [0, 1, 2])])
def test_a_share_takes_records_at_even_distances(count, share, expected):
    asked = []
    source = Numbered(count)
    source.prefetch = lambda start, stop: asked.append((start, stop))
    some = Share(source, share)
    assert [int(some[index]["caption"]) for index in range(len(some))] == expected
    with pytest.raises(IndexError):
        some[len(some)]
    some.prefetch(0, len(some))
    assert asked == [(0, expected[-1] + 1)]
    assert Share(Numbered(count), share).prefetch is None


def test_training_takes_the_share_of_every_part_and_evaluation_all():
    synthetic = {"name": "synthetic", "synthetic_size": {"train": 20, "val": 4, "test": 4}, "share": 0.25}
    alone = ConfigDict(synthetic)
    assert len(load_training(alone)) == 5 and len(load_source(alone, "val")) == 4
    entries = {"few": {"weight": 1}, "all": {"weight": 1, "share": 1.0}}
    parts = load_training(ConfigDict(synthetic | {"mixture": entries})).parts
    assert {part.name: len(part.source) for part in parts} == {"few": 5, "all": 20}
    with pytest.raises(UserError, match=r"data\.share"):
        load_config("configs/tiny.py", ["--config.data.share=0.0"])
