"""Another name of `simvlg_jax.to_torch`, which is where the other verbs are."""

from simvlg_jax.to_torch import main
from simvlg_jax.utils.errors import run_verb

if __name__ == "__main__":
    run_verb(main)
