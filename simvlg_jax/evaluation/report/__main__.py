"""The old name of the verb `simvlg_jax.report`."""

if __name__ == "__main__":
    raise SystemExit("error: this verb is now python -m simvlg_jax.report")
