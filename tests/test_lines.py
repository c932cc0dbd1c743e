"""A file of JSON lines goes on after an interruption, and refuses what does not belong to it."""

import contextlib
import json
import os
import threading
import time

import pytest

from simvlg_jax.utils.ahead import map_ahead
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.lines import Lines, json_line

ITEMS = [f"{number}.png" for number in range(7)]
SETTINGS = {"step": 4, "prompt": None, "merges": (1, 2)}


def opened(path, settings=SETTINGS, items=ITEMS, group=2):
    return contextlib.closing(Lines(path, settings, "image", items, group))


def fill(path, count=None, **options) -> None:
    with opened(path, **options) as lines:
        lines.add({"image": item, "error": "x"} if item == "1.png" else {"image": item} for item in lines.left[:count])


@pytest.mark.parametrize("kept", range(len(ITEMS) + 1))
def test_file_that_was_cut_off_anywhere_goes_on_at_a_whole_group(tmp_path, kept):
    path = tmp_path / "new" / "lines.jsonl"
    fill(path)
    whole = path.read_bytes()
    assert [json.loads(line)["image"] for line in whole.splitlines()] == ITEMS
    for torn in (b"", whole.splitlines()[kept - 1][:5], b"\0" * 9):
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]) + torn)
        with opened(path) as lines:
            done = kept if kept == len(ITEMS) else kept - kept % 2
            assert (lines.lines, lines.failed, lines.left) == (done, int(done > 1), ITEMS[done:])
        fill(path)
        assert path.read_bytes() == whole


def test_new_items_are_added_behind_the_finished_ones(tmp_path):
    fill(tmp_path / "a", 4)
    fill(tmp_path / "a", items=["new.png", *ITEMS])
    found = [json.loads(line)["image"] for line in (tmp_path / "a").read_text().splitlines()]
    assert found == [*ITEMS[:4], "new.png", *ITEMS[4:]]


def test_lines_of_other_items_stay(tmp_path):
    """A file gets the pictures of one folder, then those of another; the last group of the first was not a full one."""
    path = tmp_path / "a"
    fill(path, items=ITEMS[:3])
    fill(path, items=ITEMS[3:])
    assert [json.loads(line)["image"] for line in path.read_text().splitlines()] == ITEMS


def test_file_of_other_settings_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "lines.jsonl"
    fill(path, 3)
    before = path.read_bytes()
    with pytest.raises(
        UserError, match=r"other settings.*\n  prompt: None there, 'a' now\n  beams: None there, 5 now$"
    ):
        Lines(path, SETTINGS | {"prompt": "a", "beams": 5}, "image", ITEMS, 2)
    (tmp_path / "lines.jsonl.settings.json").write_text("[1]")
    with pytest.raises(UserError, match=r"no lines\.jsonl\.settings\.json beside it"):
        Lines(path, SETTINGS, "image", ITEMS, 2)
    assert path.read_bytes() == before


def test_damaged_line_is_refused_by_its_number_and_nothing_is_lost(tmp_path):
    fill(tmp_path / "a")
    lines = (tmp_path / "a").read_bytes().splitlines(keepends=True)
    for damaged in (b"[]\n", b"{}\n", b'{"image"\n'):
        content = b"".join([*lines[:3], damaged, *lines[4:]])
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(UserError, match=r"line 4 of .* is damaged"):
            Lines(tmp_path / "a", SETTINGS, "image", ITEMS, 2)
        assert (tmp_path / "a").read_bytes() == content


def test_two_commands_do_not_write_one_file(tmp_path):
    with opened(tmp_path / "a"), pytest.raises(UserError, match="another process writes"):
        Lines(tmp_path / "a", SETTINGS, "image", ITEMS, 2)
    assert list(tmp_path.iterdir()) == []  # no line was written


def test_path_that_cannot_be_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "file" / "a", "File exists")):
        with pytest.raises(UserError, match=f"cannot write {path}: {reason}"):
            Lines(path, SETTINGS, "image", ITEMS, 2)


def test_any_file_name_is_one_line_of_valid_json():
    for name in (b"caf\xc3\xa9.png", b"\xff\xfe.png", b'a"\n.png', "\u2028.png".encode()):
        text = json_line({"image": os.fsdecode(name)})
        assert os.fsencode(json.loads(text.encode())["image"]) == name
        assert text.count("\n") == 1


def test_map_ahead_keeps_the_order_and_holds_few_results():
    started, lock = [], threading.Lock()

    def work(item):
        with lock:
            started.append(item)
        time.sleep(0.001 * (item % 3))
        return -item

    taken = map_ahead(work, range(40), threads=4, ahead=5)
    for item in range(40):
        assert next(taken) == -item
        assert len(started) <= item + 1 + 5
    assert next(taken, None) is None

    def fail(item):
        return 1 // (item - 2)

    taken = map_ahead(fail, range(9), threads=2, ahead=3)
    assert (next(taken), next(taken)) == (-1, -1)
    with pytest.raises(ZeroDivisionError):
        next(taken)
