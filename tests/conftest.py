"""Settings of all tests. They come before jax is imported: eight devices on one CPU, to test sharded runs anywhere."""

import gc
import os
import tempfile

import quick_compile

os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", quick_compile.FLAGS]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests and the processes that they start compile the same small programs, so all of them share one folder.
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers get the environment of the process that starts them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="simvlg_jax_compiled_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="simvlg_jax_hf_")  # where transformers copies exported code to

import jax
import pytest
from ml_collections import ConfigDict

from simvlg_jax.data.openmoji import prepare
from simvlg_jax.data.readers import listing
from simvlg_jax.forecast.chips import COMPILE_ONLY

pytest_plugins = ["launching"]  # its fixtures

for name, value in COMPILE_ONLY.items():  # libtpu is loaded by the first test that compiles for a TPU
    os.environ.setdefault(name, value)


# The files that take longest, longest first: two workers that begin with them end at the same time.
LONGEST = ("processes", "kills", "training", "verbs", "contrastive", "train_compile", "tpu_runs", "wheel", "bfloat16")


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish():
    """Keeps the garbage collector from the millions of objects that the imported libraries keep for good."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(autouse=True)
def exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def openmoji_data(tmp_path_factory):
    """Returns the data config of the prepared example data."""
    folder = tmp_path_factory.mktemp("data")
    prepare.prepare_openmoji(folder)
    return ConfigDict({"name": "openmoji", "dir": str(folder)})


@pytest.fixture
def small_shards(monkeypatch):
    """Makes prepare put five records of a list into a shard."""
    monkeypatch.setattr(listing, "SMALLEST", 5)
    monkeypatch.setattr(listing, "SHARD", 5)
