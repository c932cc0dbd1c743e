"""Prepares shards under Apache Beam, which takes over retries and scaling on Dataflow, Flink or Spark."""

import functools
import importlib.util
import os
import shlex

from simvlg_jax.data.preparing.shard import Job, prepare_shard
from simvlg_jax.data.readers import Shard
from simvlg_jax.utils.errors import UserError, first_line


def check_installed() -> None:
    """Raises UserError if Apache Beam is not installed."""
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError("--engine beam needs Apache Beam: pip install 'simvlg_jax[beam]'")


def run(job: Job, shards: dict[int, Shard], options: str) -> None:
    """Prepares the shards with their numbers; their reports are in the staging folder afterwards.

    Args:
      options: of Beam's pipeline, such as "--runner=DataflowRunner --project=...".

    Raises UserError if Beam refuses the options, or if the pipeline fails.
    """
    check_installed()
    import apache_beam as beam  # Late: it is optional.
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        flags = shlex.split(options)
        pipeline_options = PipelineOptions(flags)
        pipeline = beam.Pipeline(options=pipeline_options)
    except (ValueError, SystemExit, ImportError) as error:
        raise UserError(f"Beam refuses --beam_options {options!r}: {error}", status=2) from error
    try:
        with pipeline:
            shuffled = pipeline | beam.Create(list(shards.items())) | beam.Reshuffle()
            shuffled | beam.MapTuple(functools.partial(_work, job))
    except Exception as error:  # each runner raises its own types
        raise UserError(
            f"the Beam pipeline failed ({first_line(error)[:1000]}): run again, it goes on from {os.fspath(job.output)}"
        ) from error


def _work(job: Job, number: int, shard: Shard) -> int:
    return prepare_shard(job, number, shard).written
