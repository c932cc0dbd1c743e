"""Comparisons of methods: costs from logs, what each run trains, and an interrupted one that ends as an undisturbed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from verbs import call

from simvlg_jax import compare, evaluate, train
from simvlg_jax.study import plan, runs
from simvlg_jax.study.costs import Point, reached, read_points
from simvlg_jax.study.page import chosen_text, write_results
from simvlg_jax.study.summary import spread
from simvlg_jax.tasks import build_task
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.files import write_json

VERBS = {"train": train, "evaluate": evaluate}
SETTINGS = ("data.synthetic_size.train=16", "data.synthetic_size.val=4", "data.synthetic_size.test=4")
SETTINGS += (
    "mesh.data=1",
    "train.batch_size=4",
    "train.steps=4",
    "train.log_every=2",
    "evals.val.every=2",
    "train.save_every=2",
)
STUDY = f"""
from ml_collections import ConfigDict
from simvlg_jax.study.plan import get_arm, get_config as defaults


def get_config():
    config = defaults()
    config.base = "configs/tiny.py"
    config.settings = {SETTINGS!r}
    config.arms.merged = get_arm((), tokens=(9,))
    config.arms.pooled = get_arm(
        ("task=contrastive", "train.steps=2"),
        ("connector.type=pool", "connector.tokens=4", "vit.weights={{previous}}/vit.safetensors"),
    )
    config.baseline = "pooled"
    config.seeds = (3,)
    config.search.update(key="optimizer.lr", values=(0.0015, 0.003), steps=2)
    return config.lock()
"""


@pytest.fixture
def study(tmp_path) -> plan.Study:
    (tmp_path / "study.py").write_text(STUDY)
    return plan.read_study(str(tmp_path / "study.py"), [])


def verb(name, arguments) -> None:
    assert call(VERBS[name], *arguments) == 0


def test_costs_follow_from_the_log(tmp_path):
    lines = [
        dict(step=2, kind="train", images_per_second=4.0, tflops=0.5),
        dict(step=2, kind="eval", split="val", score=0.1, loss=3.0),
        dict(step=2, kind="eval", split="other", score=9.0),
        dict(step=4, kind="train", images_per_second=2.0, tflops=0.25),
        dict(step=5, kind="eval", split="val", score=0.3, loss=2.0),  # a step after the last line, as fast as before
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, last = read_points(tmp_path, 8, "val")
    assert first == Point(16, 4.0, 2.0, 0.1, 3.0)
    assert last == Point(40, 4 + 8 + 4, 2 + 2 + 1, 0.3, 2.0)
    assert read_points(tmp_path, 8, "val", before=Point(100, 10, 20, None, None))[0][:3] == (116, 14, 22)


def test_the_cost_up_to_a_score_lies_between_two_evaluations():
    points = [Point(10, 1, 5, 0.2, None), Point(20, 3, 9, None, None), Point(30, 5, 13, 0.4, None)]
    assert reached(points, 0.3, "seconds") == pytest.approx(3.0)
    assert reached(points, 0.35, "images") == pytest.approx(25.0)
    assert reached(points, 0.1, "tflop") == 5
    assert reached(points, 0.5, "seconds") is None


def test_a_spread_leaves_out_what_is_unknown():
    found = spread([1.0, None, 4.0])
    assert (found.mean, found.low, found.high, found.count) == (2.5, 1.0, 4.0, 2)
    assert spread([None]) is None


def results(study, workdir, call) -> tuple[str, dict]:
    """Makes a comparison and returns its page and its numbers."""
    runs.Runs(study, workdir, call, lambda message: None).all(after_each=lambda: None)
    page = write_results(study, workdir)
    return page.read_text(), json.loads((workdir / "compare.json").read_text())


def test_methods_of_one_and_two_stages_are_trained_and_scored(study, tmp_path):
    study = dataclasses.replace(study, search=plan.Search("optimizer.lr", (), 2))
    page, found = results(study, tmp_path / "work", verb)
    assert "not trained yet" not in page and (tmp_path / "work" / "score_by_tflop.svg").exists()
    merged, pooled = (found["arms"][name] for name in ("merged", "pooled"))
    assert list(merged["scores"]) == ["test", "test, 9 tokens"] and list(pooled["scores"]) == ["test"]
    (record,) = pooled["records"]
    assert record["chosen"] == [None, None] and record["visual_tokens"] == 4
    first, last = record["stages"]
    assert first["images"] == 8 and last["images"] == 8 + 16 and [p["images"] for p in record["curve"]] == [16, 24]
    assert 0 < first["tflop"] < last["tflop"] and found["baseline_validation_score"] == record["curve"][-1]["score"]
    folder = tmp_path / "work" / "runs" / "pooled" / "seed_3"
    assert str(folder / "stage_1" / "vit.safetensors") in (folder / "stage_2" / "config.json").read_text()


def standin(name, arguments) -> None:
    """Writes the files of a verb, with numbers that depend on its arguments alone."""
    flags = dict(pair.split("=", 1) for pair in arguments if pair.startswith("--config."))
    workdir = Path(arguments[arguments.index("--output" if name == "evaluate" else "--workdir") + 1])
    if name == "evaluate":
        result = dict(headline="CIDEr", scores={"CIDEr": 0.5}, shuffled={"CIDEr": 0.1})
        for split in arguments[arguments.index("--split") + 1].split(",") if "--split" in arguments else ("all",):
            write_json(workdir / "eval" / f"{split}.json", result)
            write_json(workdir / "eval" / f"{split}.coco.json", [])
        return
    value = float(flags["--config.optimizer.lr"]) + int(flags["--config.seed"]) / 100
    workdir.mkdir(parents=True, exist_ok=True)
    speed = dict(images_per_second=8.0, tflops=2.0)
    lines = [
        dict(step=step, kind=kind, split="val", score=value + step / 10, loss=abs(value - 0.0315), **speed)
        for step in range(1, int(flags["--config.train.steps"]) + 1)
        for kind in ("train", "eval")
    ]
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_interrupted_and_undisturbed_comparisons_say_the_same(study, tmp_path):
    study, made, lives = dataclasses.replace(study, seeds=(3, 4)), [], 0
    _, whole = results(study, tmp_path / "whole", standin)

    def dying(name, arguments):
        if len(made) == lives:
            raise UserError("killed", 143)
        made.append((name, *arguments))
        standin(name, arguments)

    for lives in range(0, 12, 3):  # noqa: B007 (it is read by `dying`)
        with pytest.raises(UserError, match="killed"):
            results(study, tmp_path / "parts", dying)
    lives = None
    _, parts = results(study, tmp_path / "parts", dying)
    assert parts == whole
    count = len(made)
    results(study, tmp_path / "parts", dying)
    assert len(made) == count  # nothing is made again


def test_records_without_their_runs_are_enough_to_go_on_with_another_seed(study, tmp_path):
    results(study, tmp_path / "first", standin)
    shutil.copytree(tmp_path / "first" / "records", tmp_path / "moved" / "records")
    made = []

    def watched(name, arguments):
        made.append((name, *arguments))
        standin(name, arguments)

    _, found = results(dataclasses.replace(study, seeds=(3, 4)), tmp_path / "moved", watched)
    assert [record["chosen"] for record in found["arms"]["pooled"]["records"]] == [[0.0015, 0.0015]] * 2
    trained = [call for call in made if call[0] == "train"]
    assert len(trained) == 3 and all("--config.seed=4" in call for call in trained)  # nothing is searched again


def test_without_splits_all_that_an_evaluation_scores_is_recorded(study, tmp_path):
    old = tmp_path / "work" / "runs" / "merged" / "seed_3" / "scores" / "own_tokens" / "eval" / "old.json"
    write_json(old, {})  # of an evaluation that was interrupted
    _, found = results(dataclasses.replace(study, splits=()), tmp_path / "work", standin)
    assert list(found["arms"]["merged"]["scores"]) == ["all", "all, 9 tokens"]
    _, found = results(dataclasses.replace(study, splits=("a", "b")), tmp_path / "two", standin)
    assert list(found["arms"]["pooled"]["scores"]) == ["a", "b"]


def test_the_page_of_an_unfinished_comparison_says_how_much_of_it_is_done(study, tmp_path):
    page, found = results(study, tmp_path / "work", standin)
    assert "Not finished" not in page and "test, CIDEr" in page
    assert found["arms"]["pooled"]["records"][0]["chosen"][0] == min(study.search.values)
    assert "0.0015, the least" in page
    page = write_results(dataclasses.replace(study, seeds=(3, 4)), tmp_path / "work").read_text()
    assert "Not finished:</b> 2 of 4 runs are done" in page


@pytest.mark.parametrize(("chosen", "text"), [(0.03, "0.03, the least"), (0.1, "0.1"), (3.0, "3, the greatest")])
def test_a_value_at_an_edge_of_its_search_is_said_to_be_there(chosen, text):
    assert chosen_text((3.0, 0.1, 0.03), chosen) == text
    assert chosen_text((chosen,), chosen) == text.split(",")[0]


def test_each_stage_takes_the_value_with_the_lowest_loss_and_costs_add_up(study, tmp_path):
    _, found = results(study, tmp_path / "work", standin)
    (record,) = found["arms"]["pooled"]["records"]
    assert record["chosen"] == [0.0015, 0.0015]  # the stand-in's loss is 0 with seed 3 and this rate
    assert [stage["images"] for stage in record["stages"]] == [2 * 4, 6 * 4]
    assert record["stages"][-1]["seconds"] == 6 * 4 / 8 and record["stages"][-1]["tflop"] == 6 * 4 / 8 * 2
    assert found["baseline_validation_score"] == pytest.approx(0.0315 + 0.4)
    timed = found["arms"]["merged"]["up_to_the_baselines_score"]
    assert timed["images"]["mean"] == pytest.approx(16) and timed["seconds"]["mean"] == pytest.approx(2)


def test_records_of_other_settings_are_refused(study, tmp_path):
    records = tmp_path / "work" / "records"
    records.mkdir(parents=True)
    (records / "merged_3.json").write_text(json.dumps({"plan": {"base": "configs/openmoji.py"}, "curve": []}))
    with pytest.raises(UserError, match="another comparison") as error:
        runs.Runs(study, tmp_path / "work", verb, lambda message: None).all(after_each=lambda: None)
    assert error.value.status == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--config.only=('mlp',)"], "there is no arm mlp; it has merged, pooled"),
        (["--config.baseline=mlp"], "there is no arm mlp"),
        (["--config.settings=('train.stpes=3',)"], "train.steps"),
        (["--config.seeds=()"], "seeds"),
    ],
)
def test_wrong_comparisons_are_refused_before_anything_is_trained(changes, message, study, tmp_path, capsys):
    arguments = ["--config", tmp_path / "study.py", "--workdir", tmp_path / "work", *changes]
    assert call(compare, *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "work").exists()


def test_a_config_of_training_is_no_comparison(tmp_path, capsys):
    assert call(compare, "--config", "configs/tiny.py", "--workdir", tmp_path / "work") == 2
    assert "is no key of a comparison" in capsys.readouterr().err


def test_an_arm_needs_a_first_stage():
    assert plan.get_arm(("a=1",), ("b=2",)).stages == (("a=1",), ("b=2",))
    assert isinstance(plan.get_arm(("a=1",)), ConfigDict)


def test_a_failed_command_ends_with_its_status():
    with pytest.raises(UserError, match="ended with status 2") as error:
        runs.run_command("train", ["--config", "configs/none.py", "--workdir", "unused"])
    assert error.value.status == 2


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("compare.py", 9),
        ("compare.py:tokens", 5),
        ("compare.py:tenth", 3),
        ("compare.py:signal", 4),
        ("compare.py:tiny", 9),
        ("compare_clips.py", 9),
    ],
)
def test_the_recipes_arms_can_be_built(name, count):
    study = plan.read_study(f"configs/{name}", [])
    assert len(study.arms) == count
    for arm in study.arms:
        for stage in range(len(arm.stages)):
            build_task(study.config(arm, stage))
