"""Training notices damaged checkpoints, names them and passes over them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simvlg_jax.training import checkpoint, former
from simvlg_jax.training.checkpoint import Checkpoints
from simvlg_jax.training.step import TrainState
from simvlg_jax.utils.errors import UserError

POSITION = {"window": 1, "iterator": {"next_index": 7}}


def state_of(step):
    """Returns a state of float32 and int32 arrays. One is large enough for a file of its own."""
    keys = jax.random.split(jax.random.key(step), 3)
    return TrainState(
        step=jnp.int32(step),
        params={"kernel": jax.random.normal(keys[0], (64, 96)), "bias": jnp.full(5, 0.25)},
        opt_state={"kernel": jax.random.normal(keys[1], (64, 96)), "bias": jax.random.normal(keys[2], (5,))},
    )


ABSTRACT = state_of(0)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a workdir with whole checkpoints of steps 1, 2 and 3."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, keep_last=3)
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step), POSITION)
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def files_of(workdir, step):
    return sorted(path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())


def damage(path, rng):
    """Flips a bit of a file, or cuts it off."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.25:
        data = data[: rng.integers(len(data))]
    else:
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def assert_equal(state, step):
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))


def test_no_flipped_bit_and_no_truncation_is_silent(saved, tmp_path, capsys):
    """Does 50 damages over all files. Training reads what was saved, or warns and uses the checkpoint before it."""
    noticed, arrays = 0, 0
    for number in range(50):
        rng = np.random.default_rng(number)
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        paths = files_of(workdir, 3)
        path = paths[number % len(paths)] if number % 2 else max(paths, key=lambda path: path.stat().st_size)
        damage(path, rng)
        checkpoints = Checkpoints(workdir, keep_last=3)
        complete = checkpoints.latest() == 3  # else the file that says so is damaged
        restored = checkpoints.restore_newest(ABSTRACT)
        assert_equal(restored.state, restored.step)
        assert restored.position == POSITION
        warnings = capsys.readouterr().err
        if complete and restored.step != 3:
            assert restored.step == 2
            assert "checkpoint 3 is damaged" in warnings and "resuming from checkpoint 2" in warnings
            noticed += 1
            arrays += "is not as it was saved" in warnings
    assert noticed > 20 and arrays > 5


def test_training_goes_on_from_the_newest_whole_checkpoint(workdir, capsys):
    """Step 3 has a changed array and step 2 lacks a file. Both are set aside, and their steps can be saved again."""
    largest = max(files_of(workdir, 3), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 16
    largest.write_bytes(data)
    max(files_of(workdir, 2), key=lambda path: path.stat().st_size).unlink()
    checkpoints = Checkpoints(workdir, keep_last=3)
    restored = checkpoints.restore_newest(ABSTRACT)
    assert restored.step == 1 and restored.position == POSITION
    assert_equal(restored.state, 1)
    warnings = capsys.readouterr().err
    assert "checkpoint 3 is damaged" in warnings and "resuming from checkpoint 1" in warnings
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"1", "2.damaged", "3.damaged"}
    for step in (2, 3):
        checkpoints.save(step, state_of(step), POSITION)
    checkpoints.close()
    again = Checkpoints(workdir, keep_last=3).restore_newest(ABSTRACT)
    assert again.step == 3
    assert_equal(again.state, 3)


def test_nothing_is_renamed_when_no_checkpoint_is_whole(workdir):
    for step in (1, 2, 3):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "state")
    with pytest.raises(UserError, match=r"checkpoint 3 in .* is damaged, .*; no checkpoint is whole"):
        Checkpoints(workdir, keep_last=3).restore_newest(ABSTRACT)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"1", "2", "3"}


def test_parameters_alone_are_verified_too(workdir):
    checkpoints = Checkpoints(workdir, read_only=True)
    np.testing.assert_array_equal(
        checkpoints.restore_params(3, ABSTRACT.params)["kernel"], state_of(3).params["kernel"]
    )
    checks = workdir / "checkpoints" / "3" / "checks" / "metadata"
    checks.write_text(checks.read_text().replace("float32 (64, 96) [", "float32 (64, 96) [1"))
    with pytest.raises(
        UserError, match=r"params/kernel is not as it was saved.*the newest whole one is 2: use it with --checkpoint 2"
    ):
        checkpoints.restore_params(3, ABSTRACT.params)


def test_checkpoint_of_an_older_version_is_read_with_a_warning(workdir, capsys):
    folder = workdir / "checkpoints" / "3"
    shutil.rmtree(folder / "checks")
    metadata = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    del metadata["item_handlers"]["checks"]
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    restored = Checkpoints(workdir, keep_last=3).restore_newest(ABSTRACT)
    assert restored.step == 3
    assert_equal(restored.state, 3)
    assert "checkpoint 3 holds no checksums" in capsys.readouterr().err


def test_lost_checksums_are_damage(workdir):
    shutil.rmtree(workdir / "checkpoints" / "3" / "checks")
    assert Checkpoints(workdir, keep_last=3).restore_newest(ABSTRACT).step == 2


def test_disk_that_fails_for_a_moment_costs_no_checkpoint(workdir, monkeypatch):
    read_alone, tries = Checkpoints._read_alone, []

    def fail_once(*arguments):
        tries.append(arguments)
        if len(tries) == 1:
            raise OSError(5, "Input/output error")
        return read_alone(*arguments)

    monkeypatch.setattr(Checkpoints, "_read_alone", fail_once)
    assert Checkpoints(workdir, keep_last=3).restore_newest(ABSTRACT).step == 3
    assert len(tries) == 2


def test_too_little_memory_is_no_damage(workdir, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(Checkpoints, "_read_alone", fail)
    with pytest.raises(MemoryError):
        Checkpoints(workdir, keep_last=3).restore_newest(ABSTRACT)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"1", "2", "3"}


def test_checkpoints_are_named_best_latest_or_by_step(workdir):
    (workdir / "metrics.jsonl").write_text(
        '{"step": 2, "kind": "eval", "split": "val", "score": 0.5}\nnull\n{"step": 3, "kind": "ev'
    )
    checkpoints = Checkpoints(workdir, read_only=True)
    assert [checkpoints.choose(which) for which in ("best", "latest", "1", "3, 1,latest")] == [(2,), (3,), (1,), (1, 3)]
    with pytest.raises(UserError, match=r"no checkpoint '7' in .*; there are 1, 2, 3"):
        checkpoints.choose("7")


def test_best_is_kept_though_it_is_scored_after_it_was_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    for step, score in enumerate((0.3, 0.9, 0.2, 0.4), 1):
        checkpoints.save(step, state_of(step), POSITION)
        checkpoints.score(step, score)
    checkpoints.close()
    assert Checkpoints(tmp_path, read_only=True).steps() == [2, 4]


def test_of_equal_scores_the_newest_is_best_and_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step), POSITION)
        checkpoints.score(step, 0.5 if step < 3 else 0.25)
    assert checkpoints.best() == 2
    checkpoints.close()
    assert checkpoints.steps() == [2, 3]


def test_nothing_is_deleted_while_scores_are_lost(workdir, capsys):
    """The workdir was copied without its metrics.jsonl."""
    checkpoints = Checkpoints(workdir, keep_last=1, keep_best=1)
    assert "metrics.jsonl is missing" in capsys.readouterr().err
    checkpoints.save(4, state_of(4), POSITION)
    checkpoints.close()
    assert checkpoints.steps() == [1, 2, 3, 4]


def test_checkpoint_of_an_older_version_has_vl_proj_beside_the_connector(tmp_path):
    connector = {"layer": {"kernel": jnp.arange(6.0)}, "vl_proj": {"kernel": jnp.arange(4.0) + 1}}
    tree = {"connector": connector, "llm_proj": {"kernel": jnp.ones(3)}}
    state = TrainState(jnp.int32(3), tree, (jax.tree.map(lambda x: 2 * x, tree), jnp.int32(5)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, former.to_former(state), POSITION)
    checkpoints.close()
    abstract = jax.tree.map(jnp.zeros_like, state)
    restored = Checkpoints(tmp_path).restore_newest(abstract)
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)
    params = Checkpoints(tmp_path, read_only=True).restore_params(3, abstract.params)
    jax.tree.map(np.testing.assert_array_equal, params, tree)


def test_array_that_a_checkpoint_lacks_is_noticed_without_checksums_too(workdir):
    """Checkpoints of older versions have no checksums, and Orbax does not report arrays that are missing."""
    for step in (1, 2, 3):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "checks")
        metadata = workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
        written = json.loads(metadata.read_text())
        del written["item_handlers"]["checks"]
        metadata.write_text(json.dumps(written))
    params = {**ABSTRACT.params, "gate": jnp.zeros(2)}
    with pytest.raises(UserError, match=r"checkpoint 3 .*it has no params/gate"):
        Checkpoints(workdir, read_only=True).restore_params(3, params)
