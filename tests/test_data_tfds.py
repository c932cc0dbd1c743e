"""Data sets of TensorFlow Datasets: names of features are found, captions become choices, errors say what to do."""

import io
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image

from simvlg_jax.config.defaults import get_config
from simvlg_jax.data.sources import load_source
from simvlg_jax.utils.errors import UserError

F = tfds.features


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def write(folder, features, examples, suffix="array_record"):
    """Writes a data set of one file as TFDS lays it out."""
    folder.mkdir(parents=True)
    features = F.FeaturesDict(features)
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    writer = array_record_module.ArrayRecordWriter(str(folder / f"pets-train.{suffix}-00000-of-00001"), "group_size:1")
    for example in examples:
        writer.write(serializer.serialize_example(features.encode_example(example)))
    writer.close()
    template = tfds.core.ShardedFileTemplate(folder, dataset_name="pets", split="train", filetype_suffix=suffix)
    split = tfds.core.SplitInfo(name="train", shard_lengths=[len(examples)], num_bytes=0, filename_template=template)
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=[split], check_data=False)


def config(path, **options):
    data = get_config().data
    data.update(name="tfds", path=str(path), **options)
    return data


COCO = {  # the features of coco_captions
    "captions": F.Sequence({"id": np.int64, "text": F.Text()}),
    "image": F.Image(encoding_format="jpeg"),
    "image/filename": F.Text(),
    "image/id": np.int64,
}


def coco(number, texts):
    captions = [{"id": i, "text": text} for i, text in enumerate(texts)]
    return {"captions": captions, "image": png(number), "image/filename": f"{number}.jpg", "image/id": number}


def test_the_layout_of_coco_captions(tmp_path):
    texts = [["a cat", "a tabby"], ["größe"], ["x"]]
    write(tmp_path / "pets" / "1.0.0", COCO, [coco(7 + i, t) for i, t in enumerate(texts)])
    for path in (tmp_path / "pets" / "1.0.0", "pets", "pets:1.0.0"):
        source = load_source(config(path, dir=str(tmp_path)), "train", training=True)
        source = pickle.loads(pickle.dumps(source))
        assert len(source) == 3
        for i in range(3):
            record = source[i]
            assert record["image"] == png(7 + i)
            assert record["choices"] == record["references"] == texts[i]
            assert (record["id"], record["caption"]) == (str(7 + i), texts[i][0])
            assert source.info(i)[:2] == (str(7 + i), texts[i])
    with pytest.raises(IndexError):
        source[3]


def test_another_name_of_the_captions_and_records_without_ids(tmp_path):
    features = {"picture": F.Image(), "alt": F.Text(), "caption": F.Text()}
    write(tmp_path / "d", features, [{"picture": png(1), "alt": "the alt", "caption": "the caption"}])
    assert load_source(config(tmp_path / "d"), "train")[0]["caption"] == "the caption"
    source = load_source(config(tmp_path / "d", caption_key="alt"), "train")
    assert (source[0]["caption"], source[0]["id"]) == ("the alt", "0")
    with pytest.raises(UserError, match=r"no captions among the features of .*: alt, caption, picture"):
        load_source(config(tmp_path / "d", caption_key="title"), "train")


def test_a_record_without_captions_is_unreadable(tmp_path):
    write(tmp_path / "d", COCO, [coco(1, [])])
    with pytest.raises(ValueError, match="has no caption"):
        load_source(config(tmp_path / "d"), "train")[0]


def test_absent_data_name_the_command(tmp_path):
    with pytest.raises(UserError, match="tfds build coco_captions"):
        load_source(config("coco_captions", dir=str(tmp_path)), "train")
    with pytest.raises(UserError, match=r"data\.path"):
        load_source(config(""), "train")
    write(tmp_path / "d", COCO, [coco(1, ["a"])])
    with pytest.raises(UserError, match="has no split 'test'; it has train"):
        load_source(config(tmp_path / "d"), "test")
    write(tmp_path / "plain", {"image": F.Image(), "label": F.Text()}, [{"image": png(1), "label": "a"}])
    with pytest.raises(UserError, match="no captions among"):
        load_source(config(tmp_path / "plain"), "train")


def test_a_format_without_random_access_is_refused(tmp_path):
    write(tmp_path / "d", COCO, [coco(1, ["a"])], suffix="tfrecord")
    with pytest.raises(UserError, match="array_record"):
        load_source(config(tmp_path / "d"), "train")


def test_a_damaged_file_makes_its_records_unreadable(tmp_path):
    write(tmp_path / "d", COCO, [coco(1, ["a"])])
    source = load_source(config(tmp_path / "d"), "train")
    (file,) = (tmp_path / "d").glob("*.array_record*")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(OSError):
        source[0]
