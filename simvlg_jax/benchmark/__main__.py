"""Times the training step of a config and its parts, on the devices of this machine.

    python -m simvlg_jax.benchmark --config configs/tiny.py [--config.train.batch_size=64] [--steps 10] [--json]

Parts are compiled on their own over the arrays of one batch of the config's data, see benchmark/step_parts.py. Weights
that the config does not name are random. `--against torch` also takes the step with the model's PyTorch form.
"""

import json
import os
import sys
from pathlib import Path

from simvlg_jax.config.arguments import config_parser
from simvlg_jax.config.load import load_config
from simvlg_jax.utils.errors import UserError, run_verb


def main() -> None:
    parser = config_parser(__doc__, prog="python -m simvlg_jax.benchmark")
    parser.add_argument("--steps", type=int, default=10, help="a time is the median of so many")
    parser.add_argument("--rounds", type=int, default=5, help="of --against and --decode")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="write a profile of three steps")
    parser.add_argument("--decode", action="store_true", help="also time captioning, greedy and with 5 beams")
    parser.add_argument("--against", choices=("torch",), help="also time the same step in PyTorch, in turns")
    parser.add_argument("--torch_compile", action="store_true", help="of --against: try torch.compile")
    arguments, overrides = parser.parse_known_args()
    if min(arguments.steps, arguments.rounds) < 1:
        raise UserError("--steps and --rounds must be at least 1", 2)
    if arguments.torch_compile and not arguments.against:
        raise UserError("--torch_compile is about the step of --against torch: add it", 2)
    config = load_config(arguments.config, overrides)
    if arguments.against:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory to PyTorch
    from simvlg_jax.benchmark.measure import Options, measure
    from simvlg_jax.benchmark.table import describe

    names = {name: getattr(arguments, name) for name in ("steps", "rounds", "trace", "decode", "torch_compile")}
    result = measure(config, Options(against=arguments.against is not None, **names), say)
    print(json.dumps({"config": arguments.config} | result) if arguments.json else describe(arguments.config, result))


def say(message: str) -> None:
    print(f"{message} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_verb(main)
