"""The OpenMoji example: captions, families of variants, and the properties of its splits."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from simvlg_jax.data.examples import Reader
from simvlg_jax.data.openmoji import prepare
from simvlg_jax.data.openmoji.names import caption
from simvlg_jax.data.openmoji.splits import SPLITS, Picture, assign, base_of, distinct
from simvlg_jax.data.skipped import reason
from simvlg_jax.data.sources import load_source, name_of
from simvlg_jax.data.transforms import decode
from simvlg_jax.utils.errors import UserError


@pytest.mark.parametrize(
    ("name", "codes", "expected"),
    [
        (
            ":woman_juggling_medium-dark_skin_tone:",
            "1F939 1F3FE 200D 2640 FE0F",
            "woman juggling, medium-dark skin tone",
        ),
        (":man_dark_skin_tone_red_hair:", "1F468 1F3FF 200D 1F9B0", "man with red hair, dark skin tone"),
        (":person_light_skin_tone_beard:", "1F9D4 1F3FB", "person with a beard, light skin tone"),
        (":woman_bald:", "1F469 200D 1F9B2", "bald woman"),
        (
            ":men_wrestling_light_skin_tone_medium-light_skin_tone:",
            "1F468 1F3FB 200D 1FAEF 200D 1F468 1F3FC",
            "men wrestling, light and medium-light skin tones",
        ),
        (":kiss_man_man_dark_skin_tone:", "1F468 1F3FF", "kiss, two men, dark skin tone"),
        (":couple_with_heart_woman_man:", "1F469 200D 2764 FE0F 200D 1F468", "couple with heart, woman and man"),
        (":family_man_woman_girl_boy:", "1F468 200D 1F469", "family of man, woman, girl and boy"),
        (":family_adult_adult_child_child:", "1F9D1 200D 1F9D1", "family of two adults and two children"),
        (":medium-light_skin_tone:", "1F3FC", "medium-light skin tone"),
        (":St._Barth\u00e9lemy:", "1F1E7 1F1F1", "flag of Saint Barthelemy"),
        (":Antigua_&_Barbuda:", "1F1E6 1F1EC", "flag of Antigua and Barbuda"),
        (":United_Kingdom:", "1F1EC 1F1E7", "flag of the United Kingdom"),
        (":C\u00f4te_d\u2019Ivoire:", "1F1E8 1F1EE", "flag of Cote d'Ivoire"),
        (":Scotland:", "1F3F4 E0067 E0062 E0073 E0063 E0074 E007F", "flag of Scotland"),
        (":Cancer:", "264B", "Cancer"),
        (":A_button_(blood_type):", "1F170", "blood type A button"),
        (":Japanese_no_vacancy_button:", "1F235", 'Japanese "no vacancy" button'),
        (":ON!_arrow:", "1F51B", "ON arrow"),
        (":Mrs._Claus_dark_skin_tone:", "1F936 1F3FF", "Mrs Claus, dark skin tone"),
        (":keycap_#:", "0023 FE0F 20E3", "keycap number sign"),
        (":woman\u2019s_hat:", "1F452", "woman's hat"),
        (":pi\u00f1ata:", "1FA85", "pinata"),
    ],
)
def test_captions_are_plain_english(name, codes, expected):
    assert caption(name, codes.split()) == expected


@pytest.mark.parametrize(
    ("codes", "base"),
    [
        ("1F939 1F3FE 200D 2640 FE0F", "1f939"),
        ("1F468 1F3FF 200D 1F9B0", "1f9d1"),
        ("1F471 1F3FB", "1f9d1"),
        ("1F469 200D 1F33E", "1f9d1-1f33e"),
        ("1F468 200D 1F469 200D 1F467 200D 1F466", "1f46a"),
        ("1F9D1 1F3FB 200D 2764 FE0F 200D 1F48B 200D 1F9D1 1F3FC", "1f48f"),
        ("1F469 1F3FB 200D 1F91D 200D 1F468 1F3FD", "1f46d"),
        ("1FAF1 1F3FB 200D 1FAF2 1F3FC", "1f91d"),
        ("1F3C3 200D 2642 FE0F 200D 27A1 FE0F", "1f3c3"),
        ("1F57A", "1f483"),
        ("2640 FE0F", "2640"),
        ("1F9B0", "1f9b0"),
        ("1F3FB", "1f3fb"),
        ("1F1E6 1F1E8", "1f1e6-1f1e8"),
    ],
)
def test_base_drops_tone_gender_and_hair(codes, base):
    assert base_of(codes.split()) == base


@pytest.fixture(scope="module")
def splits(openmoji_data):
    """Split -> records, with the base emoji added."""
    records = {split: list(load_source(openmoji_data, split)) for split in SPLITS}
    for record in (record for split in records.values() for record in split):
        record["base"] = base_of(record["id"].upper().split("-"))
    return records


def _values(records, key):
    return {record[key] for record in records}


def test_split_sizes(splits):
    sizes = {split: len(records) for split, records in splits.items()}
    assert sizes["train"] > 3000
    assert 150 <= sizes["val"] <= 250
    assert 250 <= sizes["test"] <= 350
    assert 100 <= sizes["novel"] <= 150


def test_no_picture_caption_or_id_occurs_twice(splits):
    everything = [record for records in splits.values() for record in records]
    for key in ("image", "caption", "id"):
        assert len(_values(everything, key)) == len(everything), key


def test_held_out_variants_have_relatives_in_train_and_novel_has_none(splits):
    seen = _values(splits["train"], "base")
    assert _values(splits["val"], "base") <= seen
    assert _values(splits["test"], "base") <= seen
    assert not _values(splits["novel"], "base") & seen


def test_captions_are_ascii_and_tidy(splits):
    for record in (record for records in splits.values() for record in records):
        text = record["caption"]
        assert text.isascii() and text == " ".join(text.split()), text
        assert not set(text) & set("_:()&!#*"), text


def test_pictures_have_64_pixels_on_white(splits):
    for record in splits["val"]:
        picture = decode(record["image"])
        assert picture.size == (64, 64)
        assert picture.getpixel((0, 0)) == (255, 255, 255), record["id"]


def test_ids_and_references_are_read_once_and_without_decoding(openmoji_data, splits, monkeypatch):
    monkeypatch.setattr("PIL.Image.open", None)
    source = load_source(openmoji_data, "val")
    expected = [(record["id"], record["references"]) for record in splits["val"]]
    assert source.info(0)[:2] == expected[0]
    monkeypatch.setattr(source.source, "_records", None)
    with pytest.raises(TypeError):
        source[0]
    assert [source.info(i)[:2] for i in range(len(expected))] == expected


def test_prepare_again_changes_nothing(openmoji_data):
    def state():
        return {path: path.stat().st_mtime_ns for path in Path(openmoji_data.dir).rglob("*")}

    before = state()
    sizes = prepare.prepare_openmoji(openmoji_data.dir)
    assert state() == before
    assert set(sizes) == set(SPLITS)


def test_interrupted_prepare_leaves_no_data_set(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    from simvlg_jax.data.openmoji import openmoji_dataset_builder

    monkeypatch.setattr(openmoji_dataset_builder, "render_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare_openmoji(tmp_path)
    with pytest.raises(UserError, match=r"simvlg_jax\.data\.prepare --data_dir"):
        load_source(ConfigDict({"name": "openmoji", "dir": str(tmp_path)}), "train")


def test_absent_packages_full_disk_and_unusable_folder_are_explained(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data_dir"):
        prepare.prepare_openmoji(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "NEEDED_BYTES", 1 << 60)
        with pytest.raises(UserError, match="free"):
            prepare.prepare_openmoji(tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "emoji" else find_spec(name))
    with pytest.raises(UserError, match=r"not installed: emoji\n.*requirements-example\.txt"):
        prepare.prepare_openmoji(tmp_path)


def _picture(name, base, text, shade):
    from simvlg_jax.data.openmoji.openmoji_dataset_builder import _render

    namespace = "http://www.w3.org/2000/svg"
    svg = f'<svg viewBox="0 0 9 9" xmlns="{namespace}"><rect width="9" height="9" fill="{shade}"/></svg>'
    return Picture(name, base, text, _render(svg))


def test_pictures_that_look_the_same_are_dropped():
    pictures = [
        _picture("a", "x", "man farmer", "#808080"),
        _picture("b", "x", "farmer", "#808080"),
        _picture("c", "y", "square", "#909090"),
    ]
    assert [picture.id for picture in distinct(pictures)] == ["b", "c"]


def test_splits_do_not_depend_on_other_families_or_order():
    families = [[Picture(f"{base}-{v}", base, f"{base} {v}", b"") for v in range(8)] for base in "abcdefgh"]
    everything = assign([picture for family in families for picture in family])
    backwards = assign([picture for family in reversed(families) for picture in reversed(family)])
    for split in SPLITS:
        alone = {p.id for family in families for p in assign(family)[split]}
        assert {p.id for p in everything[split]} == {p.id for p in backwards[split]} == alone


def test_records_of_a_truncated_shard_are_skipped(openmoji_data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(openmoji_data.dir, folder)
    source = load_source(ConfigDict({"name": "openmoji", "dir": str(folder)}), "val")
    assert source[0]["id"]  # opens the shard
    (shard,) = folder.rglob("*val*.array_record*")
    os.truncate(shard, shard.stat().st_size // 2)
    reads = [Reader(source)[index] for index in range(len(source))]
    dead = [read for read in reads if read.error is not None]
    assert 0 < len(dead) < len(reads) and {reason(read.error) for read in dead} == {"truncated"}
    assert name_of(source, dead[0].number) is None and name_of(source, 0) == source.info(0).id
