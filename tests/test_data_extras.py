"""Groups and choices come from the source's rows to the records of an evaluation."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from preparing import run, skipped, write_json, write_pictures

from simvlg_jax.data.extras import NONE, Extras
from simvlg_jax.data.preparing.run import Settings, _fingerprint
from simvlg_jax.data.readers import Example, Plan, fields
from simvlg_jax.data.sources import load_source

ROWS = [
    {"question": "What?", "answer": ["cat"], "choices": ["dog", "cat"], "correct_choice_idx": 1},  # A-OKVQA
    {"question": "Who?", "answer": 0, "choices": ["me", "you"]},  # ScienceQA
    {"question": "Is it?", "answer": "no", "choices": ["yes", "no"]},
]
EXPECTED = [
    (["cat"], Extras("indoor", ("dog", "cat"), 1)),
    (["me"], Extras("indoor", ("me", "you"), 0)),
    (["no"], Extras("indoor", ("yes", "no"), None)),
]
# Of plans of one picture, see the test.
FINGERPRINTS = {
    "plain": "9f4020ec18b5ae8fff43dc168f17d56f59dfc11aa3591c7a6e8c3d7c680af004",
    "grouped": "abb34005ac8367bf96c055897c1cdd913e0f58f0a3eaad545643bdeb18c40880",
}


def infos(output) -> list:
    source = load_source(ConfigDict(dict(name="prepared", path=str(output))), "val")
    return [source.info(index) for index in range(len(source))]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_choices_and_group_of_questions(tmp_path, kind):
    names = write_pictures(tmp_path / "list", 3)
    rows = [row | {"image": name, "group": "indoor"} for row, name in zip(ROWS, names, strict=True)]
    path = tmp_path / "list" / f"list.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        lines = ["image;question;answer;choices;correct;group"]
        for row, (texts, extras) in zip(rows, EXPECTED, strict=True):
            place = "" if extras.correct is None else extras.correct
            lines.append(f"{row['image']};{row['question']};{texts[0]};{_cell(extras.choices)};{place};indoor")
        path.write_text("\n".join(lines))
    else:
        columns = {name: [row[name] for row in rows] for name in ("image", "question", "choices", "group")}
        columns |= {"answer": [texts for texts, _ in EXPECTED], "correct": [e.correct for _, e in EXPECTED]}
        columns["image"] = [(tmp_path / "list" / name).read_bytes() for name in names]
        pq.write_table(pa.table(columns), path)
    run(tmp_path / "out", path, split="val")
    found = infos(tmp_path / "out")
    assert [(info.references, info.extras) for info in found] == EXPECTED
    assert [info.prompt for info in found] == [f"Question: {row['question']} Short answer:" for row in ROWS]


def _cell(choices) -> str:
    return '"' + json.dumps(choices).replace('"', '""') + '"'


def test_domains_of_nocaps(tmp_path):
    domains = ["in-domain", "near-domain", "out-domain"]
    images = [{"id": n, "file_name": f"{n}.png", "domain": domain} for n, domain in enumerate(domains)]
    annotations = [{"image_id": n, "caption": f"caption {n} {k}"} for n in range(3) for k in range(2)]
    source = write_json(tmp_path / "nocaps", {"images": images, "annotations": annotations}, 3)
    run(tmp_path / "out", source, split="val")
    assert [(info.id, info.extras.group) for info in infos(tmp_path / "out")] == [
        (str(n), domain) for n, domain in enumerate(domains)
    ]


def test_the_rows_of_a_picture_share_their_group(tmp_path):
    rows = [{"image": "0.png", "caption": "a"}, {"image": "0.png", "caption": "b", "domain": "near"}]
    run(tmp_path / "out", write_json(tmp_path / "list", [*rows, {"image": "1.png", "caption": "c"}], 2), split="val")
    assert [(info.references, info.extras) for info in infos(tmp_path / "out")] == [
        (["a", "b"], Extras("near")),
        (["c"], NONE),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_captions_of_the_reverse(tmp_path, kind):
    names = write_pictures(tmp_path / "list", 3)
    reverses = ["falls", None, "falls"]
    rows = [{"image": name, "caption": "rises"} for name in names]
    rows = [row if text is None else row | {"reverse_caption": text} for row, text in zip(rows, reverses, strict=True)]
    path = tmp_path / "list" / f"list.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        lines = [f"{row['image']},rises,{row.get('reverse_caption', '')}" for row in rows]
        path.write_text("\n".join(["image,caption,reverse_caption", *lines]))
    else:
        images = [(tmp_path / "list" / name).read_bytes() for name in names]
        pq.write_table(pa.table({"image": images, "caption": ["rises"] * 3, "reverse_caption": reverses}), path)
    run(tmp_path / "out", path, split="val")
    assert [info.extras for info in infos(tmp_path / "out")] == [Extras(reverse_caption=text) for text in reverses]


@pytest.mark.parametrize(("value", "reason"), [(3, "wrong type"), (" ", "reverse_caption empty"), ("", None)])
def test_captions_of_the_reverse_that_cannot_be_used(tmp_path, value, reason):
    rows = [{"image": f"{n}.png", "caption": "rises", "reverse_caption": "falls"} for n in range(2)]
    rows[1]["reverse_caption"] = value
    run(tmp_path / "out", write_json(tmp_path / "list", rows, 2), split="val")
    assert [why for _, why in skipped(tmp_path / "out", "val")] == ([reason] if reason else [])


def test_data_that_were_prepared_before_there_were_captions_of_the_reverse_stay_valid(tmp_path):
    """The fingerprints are those of the commit 68d8c60."""
    pairs = {"plain": {}, "grouped": {"group": "near"}}
    for name, extra in pairs.items():
        example = Example("list", 0, "0.png", "", ("a",), extras=Extras(**extra))
        plan = Plan(entries=[example], roots=["root"])
        assert _fingerprint(Settings(["list"], "out"), plan, "table") == FINGERPRINTS[name]
    plan.entries = [example._replace(extras=Extras("near", reverse_caption="b"))]
    assert _fingerprint(Settings(["list"], "out"), plan, "table") not in FINGERPRINTS.values()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": 2}, "no such choice"),
        ({"choices": ["me", ""]}, "choice empty"),
        ({"choices": "me"}, None),
        ({"choices": 3}, "wrong type"),
        ({"choices": [], "answer": "me"}, None),
    ],
)
def test_choices_that_cannot_be_used_are_skipped_and_listed(tmp_path, change, reason):
    rows = [row | {"image": f"{number}.png"} for number, row in enumerate(ROWS)]
    rows[1] |= change
    run(tmp_path / "out", write_json(tmp_path / "list", rows, 3), split="val")
    assert [why for _, why in skipped(tmp_path / "out", "val")] == ([reason] if reason else [])


@pytest.mark.parametrize(("place", "correct"), [(1.0, 1), (-1, None), (True, None)])
def test_the_place_of_the_right_choice_may_be_a_whole_float_or_hidden(place, correct):
    row = {"image": "0.png", "question": "Which?", "answer": "a", "choices": ["a", "b"], "correct": place}
    assert fields.parse(row).extras.correct == correct
