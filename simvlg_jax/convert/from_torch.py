"""`python -m simvlg_jax.convert.from_torch` runs the verb `simvlg_jax.from_torch`."""

from simvlg_jax.from_torch import main
from simvlg_jax.utils.errors import run_verb

if __name__ == "__main__":
    run_verb(main)
