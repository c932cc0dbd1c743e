"""Trains or resumes a run.

    python -m simvlg_jax.train --config configs/tiny.py --workdir runs/tiny [--config.train.steps=100] [--distributed]

With several processes, start the same command in each. SIGTERM to any of them saves the run and stops all processes at
the same step.

Exit status: 0 done or out of time, 130 or 143 after SIGINT or SIGTERM; the run is saved in these cases. 1 failed and
would fail again, 2 invalid arguments or config, 70 failed unexpectedly, 75 another process of the run is missing or
still trains in the workdir. The same command resumes from the newest whole checkpoint.
"""

from pathlib import Path

from simvlg_jax.config.arguments import add_cache_argument, add_process_argument, config_parser
from simvlg_jax.config.load import load_config
from simvlg_jax.utils.errors import run_verb


def main() -> int:
    parser = config_parser(__doc__, prog="python -m simvlg_jax.train")
    parser.add_argument("--workdir", type=Path, required=True, help="gets checkpoints, metrics, the report")
    add_process_argument(parser)
    add_cache_argument(parser)
    arguments, overrides = parser.parse_known_args()
    config = load_config(arguments.config, overrides)
    # The config is checked before jax is imported, which takes seconds.
    from simvlg_jax.parallel import processes
    from simvlg_jax.parallel.compile_cache import keep_compiled
    from simvlg_jax.training.loop import train

    keep_compiled(not arguments.no_cache)
    return processes.run(lambda: train(config, arguments.workdir), arguments.distributed, preemptible=True)


if __name__ == "__main__":
    run_verb(main)
