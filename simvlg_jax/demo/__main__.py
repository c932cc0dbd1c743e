"""Shows a model in a page of this machine's browser: captions, merge maps, answers, and any number of visual tokens.

    python -m simvlg_jax.demo --example
    python -m simvlg_jax.demo --workdir runs/openmoji --port 8000

The page needs no network. Only this machine can open it, unless --host names another address. Pictures that are dropped
on it are deleted when the demo stops.
"""

import argparse
import errno
import os
import signal
import socket
import sys
import tempfile
import threading

from simvlg_jax.config.arguments import add_cache_argument, add_checkpoint_argument, add_model_arguments, model_folder
from simvlg_jax.utils.errors import UserError, run_verb

EXAMPLE_NOTE = (
    "This example was trained on emoji only, with their names as captions: of other pictures and of questions it "
    "understands little."
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    add_checkpoint_argument(parser)
    add_cache_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine")
    parser.add_argument("--port", type=int, default=7860)
    parser.epilog = "Any config value can be set: --config.evaluate.num_beams=5"
    arguments, overrides = parser.parse_known_args()
    check_address(arguments.host, arguments.port)
    with tempfile.TemporaryDirectory(prefix="simvlg_jax_demo_") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        serve(arguments, overrides)


def serve(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Shows the page until SIGINT or SIGTERM."""
    try:
        from simvlg_jax.demo import page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the demo needs Gradio: pip install 'simvlg_jax[demo]'") from error

    from simvlg_jax.api import find, read_weights
    from simvlg_jax.demo.looks import Looks
    from simvlg_jax.parallel.compile_cache import keep_compiled
    from simvlg_jax.utils.progress import Announcer

    keep_compiled(not arguments.no_cache)
    folder = model_folder(arguments)
    run = find("example" if arguments.example else folder, None, arguments.checkpoint, overrides)
    with Announcer(say).first("reading and compiling the model"):
        looks = Looks(read_weights(run, overrides, 1))
    name, note = ("the trained example", EXAMPLE_NOTE) if arguments.example else (folder.resolve().name, "")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    shown = page.build(looks, name, note)
    page.launch(shown, arguments.host, arguments.port)
    say(f"open http://{arguments.host}:{arguments.port} in a browser; Ctrl-C stops the demo")
    stopped.wait()
    shown.close(verbose=False)


def check_address(host: str, port: int) -> None:
    """Raises UserError if this machine cannot listen there."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port is {port}; it must be between 1 and 65535", 2)
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is taken, perhaps by another demo: choose another one with --port") from error
        reason = error.strerror or error
        raise UserError(f"cannot listen on {host}:{port} ({reason}): check --host and --port") from error


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_verb(main)
