"""Command-line arguments that several verbs use."""

import argparse
from pathlib import Path

from simvlg_jax.config.saved import EXAMPLE


def config_parser(description: str | None, *, required: bool = True, **kwargs) -> argparse.ArgumentParser:
    """Returns a parser with --config. Arguments that it does not parse are overrides for `load_config`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
    )
    parser.add_argument("--config", required=required, help="configs/X.py or configs/X.py:arg")
    parser.epilog = "Any config value can be set: --config.train.steps=100"
    return parser


def add_process_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --distributed: this process is one of several. See `parallel.processes`."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="this process is one of several. JAX detects the others (TPU slice, Slurm, Open MPI); elsewhere set "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --no_cache. See `parallel.compile_cache`."""
    parser.add_argument("--no_cache", action="store_true", help="compile anew, and keep no compiled program")


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --checkpoint: best, latest, a step, or several steps."""
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="STEP",
        help="best (highest validation score, the default), latest, a step, or the mean of several: 1900,2000",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --workdir DIR and --example, which select a trained model. See `model_folder`."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", type=Path, help="a run of simvlg_jax.train, or an exported model")
    which.add_argument("--example", action="store_true", help="the trained example that comes with the package")


def model_folder(arguments: argparse.Namespace) -> Path:
    """Returns the folder that --workdir or --example selects."""
    return EXAMPLE if arguments.example else arguments.workdir
