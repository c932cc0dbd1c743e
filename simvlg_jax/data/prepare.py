"""Alias of the verb `simvlg_jax.prepare`."""

from simvlg_jax.prepare import main
from simvlg_jax.utils.errors import run_verb

if __name__ == "__main__":
    run_verb(main)
