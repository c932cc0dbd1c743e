"""The index of prepared data: rows survive writing, merging and pickling, and damage is reported."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc

from simvlg_jax.data import index as indexes
from simvlg_jax.data.extras import NONE, Extras
from simvlg_jax.data.index import Index, Row, Tar, merge_indexes, write_index
from simvlg_jax.utils.errors import UserError

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
ROWS = st.lists(
    st.builds(
        Row,
        TEXT,
        st.lists(TEXT, min_size=1, max_size=4),
        st.none() | TEXT,
        st.integers(0, 1),
        st.integers(0, 2**40),
        st.integers(0, 2**33),
        st.none() | TEXT,
        st.none() | st.lists(TEXT, max_size=3),
        st.none() | st.integers(0, 2**31 - 1),
    ),
    max_size=12,
)


def tars_of(part: int) -> list[Tar]:
    return [Tar(f"{part}/{name}.tar", 1024 + part) for name in "ab"]


@given(parts=st.lists(ROWS, min_size=1, max_size=3), batch=st.integers(1, 5))
def test_rows_survive_writing_and_merging(tmp_path_factory, parts, batch):
    folder = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexes, "BATCH", batch)
        for number, rows in enumerate(parts):
            write_index(
                folder / str(number), rows, media="video", tars=[Tar(f"{number}/{name}.tar", 1024) for name in "ab"]
            )
        merge_indexes(folder / "all", [folder / str(number) for number in range(len(parts))])
    index = pickle.loads(pickle.dumps(Index(folder / "all")))
    assert index.media == "video"
    assert [index[i]._replace(tar=index.tars[index[i].tar]) for i in range(len(index))] == [
        row._replace(tar=Tar(f"{number}/{'ab'[row.tar]}.tar", 1024))
        for number, rows in enumerate(parts)
        for row in rows
    ]
    everything = [row for rows in parts for row in rows]
    np.testing.assert_array_equal(index.counts(), [len(row.texts) for row in everything])
    assert index.has_questions == any(row.question is not None for row in everything)


def test_an_index_without_extras_is_read_and_merged(tmp_path):
    rows = [Row("a", ["b"]), Row("c", ["d", "e"], "what?", group="near", choices=["d", "f"], correct=0)]
    for name, row in zip("01", rows, strict=True):
        write_index(tmp_path / name, [row])
    old = Index(tmp_path / "0").table
    old = old.select([name for name in old.schema.names if name not in indexes.OPTIONAL])
    with ipc.new_file(tmp_path / "old", old.schema) as writer:
        writer.write_table(old)
    assert Index(tmp_path / "old")[0] == rows[0]
    assert rows[0].extras == NONE and rows[1].extras == Extras("near", ("d", "f"), 0)
    merge_indexes(tmp_path / "all", [tmp_path / "old", tmp_path / "1"])
    assert list(Index(tmp_path / "all")) == rows


def test_a_row_outside_is_an_index_error(tmp_path):
    write_index(tmp_path / "i", [Row("a", ["b"])])
    with pytest.raises(IndexError):
        Index(tmp_path / "i")[1]


@pytest.mark.parametrize("content", [None, b"", b"ARROW1\0\0", b"no index at all" * 99])
def test_a_file_that_is_no_index_is_reported(tmp_path, content):
    if content is not None:
        (tmp_path / "i").write_bytes(content)
    with pytest.raises(UserError, match="index"):
        Index(tmp_path / "i")


def test_a_truncated_index_is_reported(tmp_path):
    write_index(tmp_path / "i", [Row(str(n), ["text"]) for n in range(1000)])
    whole = (tmp_path / "i").read_bytes()
    (tmp_path / "i").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        Index(tmp_path / "i")


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def rows():
        yield Row("a", ["b"])
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_index(tmp_path / "i", rows())
    assert list(tmp_path.iterdir()) == []
