"""Runs command-line verbs within a test."""

import sys
from types import ModuleType

from simvlg_jax.utils import errors


def call(module: ModuleType, *arguments) -> int:
    """Runs a verb in this process and returns its exit status."""
    before, sys.argv = sys.argv, [module.__name__, *map(str, arguments)]
    try:
        errors.run_verb(module.main)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
