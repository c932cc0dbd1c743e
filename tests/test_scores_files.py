"""The files for official evaluations: their formats, and the ids from the source's list to the file."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from preparing import caption, write_json, write_pictures
from preparing import run as run_prepare
from verbs import call

from simvlg_jax import evaluate, prepare, train
from simvlg_jax.data.index import Index
from simvlg_jax.data.sources import load_source
from simvlg_jax.evaluation import submissions
from simvlg_jax.evaluation.report.results import read_splits
from simvlg_jax.evaluation.scores.answers import ACCURACIES
from simvlg_jax.evaluation.written import Written


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    flags = ["train.steps=1", "evals.val.every=0", "evaluate.batch_size=4", "evaluate.max_new_tokens=6", "mesh.data=1"]
    flags = [f"--config.{flag}" for flag in flags]
    assert call(train, "--config", "configs/tiny.py", "--workdir", workdir, *flags) == 0
    return workdir


def score(run, data, output, *arguments) -> int:
    data = ("--config.data.name=prepared", f"--config.data.path={data}")
    return call(evaluate, "--workdir", run, "--output", output, *data, *arguments)


def read(path):
    return json.loads(path.read_text())


def prepare_split(source, output, split="val", *more) -> int:
    return call(prepare, "--source", source, "--output", output, "--split", split, "--workers", 1, *more)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0", 0),
        ("391895", 391895),
        ("007", "007"),
        ("-1", "-1"),
        ("coco_57870", 57870),
        ("val2014/COCO_val2014_000000184613.jpg", 184613),
        ("COCO_test2015_000000000016.jpg", 16),
        ("video7", "video7"),
        ("cats/12.jpg", "cats/12.jpg"),
        ("\u0663", "\u0663"),
    ],
)
def test_image_id_is_a_number_where_the_record_has_one(name, expected):
    assert submissions.coco([(name, "a cat")]) == {".coco.json": [{"image_id": expected, "caption": "a cat"}]}


def test_formats_of_vqa_and_gqa():
    assert submissions.OF_METRIC.keys() == ACCURACIES.keys()
    texts = [("262144000", "yes"), ("7", "")]
    answers = [{"question_id": 262144000, "answer": "yes"}, {"question_id": 7, "answer": ""}]
    assert submissions.OF_METRIC["vqa"](texts) == {".vqa.json": answers}
    assert submissions.OF_METRIC["vqa"]([*texts, ("a.jpg#1", "no")]) == {}  # not VQA's questions
    for metric in ("gqa", "gqa_published"):
        expected = [{"questionId": "262144000", "prediction": "yes"}, {"questionId": "7", "prediction": ""}]
        assert submissions.OF_METRIC[metric](texts) == {".gqa.json": expected}
    assert submissions.OF_METRIC["exact"](texts) == {}


def test_files_name_what_cannot_be_read():
    written = Written(None, [{"id": "1", "caption": "a dog", "references": []}], ["2"])
    assert written.texts() == [("1", "a dog"), ("2", "")]


def test_questions_keep_their_ids_and_those_without_answers_are_answered(run, tmp_path):
    rows = [
        {"image": f"{n % 3}.png", "question": f"What is {n}?", "question_id": 262144000 + n, "answer": ["yes", "no"]}
        for n in range(6)
    ]
    bare = [{key: value for key, value in row.items() if key != "answer"} for row in rows]
    data, output = tmp_path / "prepared", tmp_path / "results"
    assert prepare_split(write_json(tmp_path / "a", rows, 3), data) == 0
    assert prepare_split(write_json(tmp_path / "b", bare, 3), data, "test", "--unlabelled") == 0
    assert score(run, data, output, "--type", "questions", "--split", "val,test") == 0
    labelled, unlabelled = (read(output / "eval" / f"{split}.json") for split in ("val", "test"))
    for split, results in (("val", labelled), ("test", unlabelled)):
        answers = read(output / "eval" / f"{split}.vqa.json")
        assert [answer["question_id"] for answer in answers] == [row["question_id"] for row in rows]
        assert [answer["answer"] for answer in answers] == [one["caption"] for one in results["examples"]]
    assert "unlabelled" not in labelled and labelled["loss"] > 0
    # The same questions about the same pictures have the same answers, and nothing to compare them with.
    assert [one["caption"] for one in unlabelled["examples"]] == [one["caption"] for one in labelled["examples"]]
    assert (unlabelled["unlabelled"], unlabelled["num_examples"], unlabelled["scores"]) == (6, 6, {})
    assert unlabelled["loss"] is None
    for example in unlabelled["examples"]:
        assert example["score"] is example["loss"] is None and example["tokens"] == []
    assert "What is 4?" in (output / "report.html").read_text()

    arguments = ("--type", "choices", "--choices", "answers", "--metric", "vqa", "--ranking", "mean", "--split", "val")
    assert score(run, data, output, *arguments) == 0
    results = read(output / "eval" / "val.json")
    assert (results["type"], results["scores"]["chance"]) == ("choices", pytest.approx(1 / 6))
    assert {example["caption"] for example in results["examples"]} <= {"yes", "no"}
    for example in results["examples"]:
        (_, best, best_tokens), (_, other, tokens) = example["choices"]
        assert best / best_tokens >= other / tokens
    assert [answer["question_id"] for answer in read(output / "eval" / "val.vqa.json")] == [
        row["question_id"] for row in rows
    ]
    assert "What is 4?" in (output / "report.html").read_text()
    arguments = ("--type", "choices", "--choices", "answers", "--split", "val")
    assert score(run, data, output, *arguments) == 0
    assert not (output / "eval" / "val.vqa.json").exists()  # the metric has no official file


def test_records_without_texts_need_the_option(tmp_path, capsys):
    rows = [{"image": f"{n}.png", "question": "What?", "question_id": n} for n in range(2)]
    source = write_json(tmp_path / "list", rows, 2)
    assert prepare_split(source, tmp_path / "out", "test") == 1
    assert "no answer 2" in (error := capsys.readouterr().err) and "add --unlabelled" in error
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(2):
        (tmp_path / "list" / f"{n}.png").rename(pictures / f"{n}.png")
        (pictures / f"{n}.txt").write_text(caption(n))
    assert prepare_split(pictures, tmp_path / "out", "test", "--unlabelled") == 2
    assert "--unlabelled is for lists and tables" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_keep_rows_without_texts(tmp_path, kind):
    names = write_pictures(tmp_path / "list", 3)
    path = tmp_path / "list" / f"list.{kind}"
    if kind == "parquet":
        images = [{"bytes": (tmp_path / "list" / name).read_bytes(), "path": name} for name in names]
        pq.write_table(pa.table({"image": images, "question": ["Who?"] * 3, "answer": [["a"], ["b"], None]}), path)
    elif kind == "csv":
        path.write_text("image,question,answer\n0.png,Who?,a\n1.png,Who?,b\n2.png,Who?,\n")
    else:
        lines = [{"image": n, "question": "Who?", "answer": a} for n, a in zip(names, ["a", ["b"], []], strict=True)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_prepare(tmp_path / "out", path, unlabelled=True, split="test")
    assert [row.texts for row in Index(tmp_path / "out" / "index-test.arrow")] == [["a"], ["b"], []]
    source = load_source(ConfigDict(dict(name="prepared", path=str(tmp_path / "out"))), "test")
    assert (source[2]["caption"], source[2]["references"], source.info(2).references) == ("", [], [])


def test_an_evaluation_without_references_cannot_choose_the_best_checkpoint(tmp_path, capsys):
    bare = [{"image": f"{n}.png"} for n in range(8)]
    rows = [row | {"caption": caption(n)} for n, row in enumerate(bare)]
    assert prepare_split(write_json(tmp_path / "a", rows, 8), tmp_path / "out", "train") == 0
    assert prepare_split(write_json(tmp_path / "b", bare, 8), tmp_path / "out", "val", "--unlabelled") == 0
    flags = ["data.name=prepared", f"data.path={tmp_path / 'out'}", "mesh.data=1", "train.steps=1"]
    flags = [f"--config.{flag}" for flag in flags]
    assert call(train, "--config", "configs/tiny.py", "--workdir", tmp_path / "run", *flags) == 2
    assert "train.best_by is 'val', whose records have no captions" in capsys.readouterr().err


def test_captions_are_a_result_file_of_coco(run, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    images = [{"id": 1000 + n, "file_name": f"{n}.png"} for n in range(3)]
    annotations = [
        {"id": 10 * n + k, "image_id": 1000 + n, "caption": f"{caption(n)} {k}"} for n in range(3) for k in range(2)
    ]
    source = write_json(tmp_path / "coco", {"images": images, "annotations": annotations}, 3)
    assert prepare_split(source, tmp_path / "prepared") == 0
    output = tmp_path / "results"
    assert score(run, tmp_path / "prepared", output, "--split", "val") == 0
    loaded = coco.COCO(str(source)).loadRes(str(output / "eval" / "val.coco.json"))  # checks the ids
    examples = read(output / "eval" / "val.json")["examples"]
    assert {name: loaded.imgToAnns[int(name)][0]["caption"] for name in ("1000", "1001", "1002")} == {
        example["id"]: example["caption"] for example in examples
    }
    assert [split["name"] for split in read_splits(output)] == ["val"]  # the other file is no split
