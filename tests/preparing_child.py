"""Prepares in a forked process with small shards, so that a kill hits any moment of the work, not of starting up."""

import multiprocessing.synchronize
import os
import sys

from simvlg_jax.data.preparing import records
from simvlg_jax.data.preparing.run import Settings, prepare
from simvlg_jax.data.readers import listing

records.features("image", False).to_json()  # TFDS imports most of itself late


def child(settings: Settings, started: multiprocessing.synchronize.Event) -> None:
    listing.SMALLEST = listing.SHARD = 8
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    started.set()
    prepare(settings)
