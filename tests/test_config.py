"""Every number of a config has a range, and one line names what is wrong in a config file."""

import re
from fnmatch import fnmatch

import pytest
from ml_collections import ConfigDict
from verbs import call

from simvlg_jax import train
from simvlg_jax.config import defaults
from simvlg_jax.config.check import RANGES, check_range, flat_keys, range_of
from simvlg_jax.config.load import fill, load_config, override
from simvlg_jax.utils.errors import UserError


def numbers():
    flat = flat_keys(defaults.get_config())
    return {k: v for k, v in flat.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def test_every_number_has_a_range_that_holds_its_default():
    matched = {key: [pattern for pattern in RANGES if fnmatch(key, pattern)] for key in numbers()}
    assert all(len(patterns) == 1 for patterns in matched.values()), matched
    assert {pattern for patterns in matched.values() for pattern in patterns} == set(RANGES)
    for key, value in numbers().items():
        check_range(key, value)


@pytest.mark.parametrize("key", numbers())
def test_numbers_out_of_range_are_refused(key):
    low, high = range_of(key)
    for value in (low - 1, float("nan"), float("inf"), *([high + 1] if high < 1e300 else [])):
        with pytest.raises(
            UserError, match=rf"^{key.replace('.', '[.]')} is .*; it must be (at least|above)"
        ) as raised:
            check_range(key, value)
        assert raised.value.status == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.save_every=0", "train.save_every is 0; it must be at least 1"),
        ("data.workers=-1", "data.workers is -1; it must be at least 0"),
        ("optimizer.lr=-1.0", "optimizer.lr is -1.0; it must be above 0"),
        ("connector.dropout=1.0", "connector.dropout is 1.0; it must be at least 0 and below 1"),
        ("connector.inflect=2.0", "it must be at least -1 and at most 1"),
        ("data.crop_scale=(2.0, -1.0)", "data.crop_scale is (2.0, -1.0); it takes two shares"),
        ("data.crop_scale=(0.5,)", "data.crop_scale is (0.5,); it takes two shares"),
        ("connector.merges=(5, -1)", "connector.merges"),
        ("dtype=float64", "dtype is 'float64'; it takes 'float32', 'bfloat16'"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting, message):
    with pytest.raises(UserError) as raised:
        load_config("configs/tiny.py", [f"--config.{setting}"])
    assert message in str(raised.value) and raised.value.status == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "line 1: invalid syntax"),
        ("import nothing_of_this_name\n", "nothing_of_this_name"),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("def get_config():\n    return {}\n", "get_config returns dict instead of a ConfigDict"),
        ("x = 1\n", "get_config"),
        ("from ml_collections import ConfigDict\ndef get_config():\n    ConfigDict().a.b = 1\n", "'a'"),
    ],
)
def test_config_file_that_is_wrong_is_named_in_a_line(tmp_path, capsys, text, message):
    path = tmp_path / "wrong.py"
    path.write_text(text)
    assert call(train, "--config", path, "--workdir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: config {path}: ") and message in error and error.count("\n") == 1


def test_override_gives_a_changed_copy():
    config = load_config("configs/tiny.py")
    changed = override(config, ["--config.evaluate.batch_size=3", "--config.data.crop_scale=(0.25, 1.0)"])
    assert (changed.evaluate.batch_size, changed.data.crop_scale) == (3, (0.25, 1.0))
    assert config.evaluate.batch_size == 8


def test_former_keys_of_the_one_evaluation_are_kept_in_their_new_place():
    config = defaults.get_config()
    del config.evals
    config.train.eval_every, config.evaluate.max_examples = 7, 3
    filled = fill(config)
    assert (filled.evals.val.every, filled.evals.val.max_examples, filled.evals.val.split) == (7, 3, "val")
    assert flat_keys(filled).keys() == flat_keys(defaults.get_config()).keys()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.train.bacth_size = 4", "unknown config key 'train.bacth_size'; did you mean train.batch_size"),
        ("config.train.eval_every = 7", "the config key 'train.eval_every' is now 'evals.val.every'"),
        ("config.evals.val.evry = 7", "unknown config key evals.val.evry; it takes "),
        ("config.evals.val.data.pth = 'x'", "unknown config key evals.val.data.pth; it takes "),
        ("config.evals.val.data.workers = -1", "data.workers is -1; it must be at least 0"),
        ("config.vit.max_frames = 4", "it needs vit.temporal=True"),
    ],
)
def test_keys_of_a_config_file_that_mean_nothing_are_refused(tmp_path, line, message):
    text = (
        f"from simvlg_jax.config import defaults\ndef get_config():\n    config = defaults.get_config()\n    {line}\n"
    )
    (tmp_path / "wrong.py").write_text(f"{text}    return config\n")
    with pytest.raises(UserError) as raised:
        load_config(str(tmp_path / "wrong.py"))
    assert message in str(raised.value) and raised.value.status == 2


def test_override_of_one_element_is_refused_in_a_line():
    with pytest.raises(UserError, match=r"unknown config key 'connector\.merges\[0\]'; did you mean connector\.merges"):
        load_config("configs/tiny.py", ["--config.connector.merges[0]=2"])


def test_flags_give_an_evaluation_data_and_decoding_of_its_own():
    flags = ("data.path=x", "data.crop_scale=(0.5,0.9)", "decoding.num_beams=3")
    config = load_config("configs/tiny.py", [f"--config.evals.val.{flag}" for flag in flags])
    assert config.evals.val.data.to_dict() == {"path": "x", "crop_scale": (0.5, 0.9)} and config.data.path == ""
    assert config.evals.val.decoding.to_dict() == {"num_beams": 3} and config.evaluate.num_beams == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("evals.val.data.pth=x", "unknown config key 'evals.val.data.pth'"),
        ("evals.val.data.workers=-1", "data.workers is -1"),
        ("evals.val.data.workers=many", "evals.val.data.workers"),
        ("evals.other.data.path=x", "unknown config key 'evals.other.data.path'"),
        ("evals.val.data.mixture=x", "unknown config key 'evals.val.data.mixture'"),
    ],
)
def test_wrong_keys_of_an_evaluation_are_refused(flag, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_config("configs/tiny.py", [f"--config.{flag}"])
    assert error.value.status == 2


def test_evaluations_of_ones_own_are_filled_and_checked():
    config = defaults.get_config()
    config.evals = ConfigDict(dict(coco=dict(split="test", every=50)))
    filled = fill(config)
    assert list(filled.evals) == ["coco"] and filled.evals.coco.max_examples == 0
    with pytest.raises(UserError, match=r"evals\.coco\.every is -1; it must be at least 0"):
        override(filled, ["--config.evals.coco.every=-1"])
