"""Alias of the verb `simvlg_jax.inspect_data`."""

from simvlg_jax.inspect_data import main
from simvlg_jax.utils.errors import run_verb

if __name__ == "__main__":
    run_verb(main)
