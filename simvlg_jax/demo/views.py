"""The parts of the page as HTML, without Gradio, made from what a person gives. Errors are short messages."""

import functools
from pathlib import Path

import jax
import numpy as np
from markupsafe import escape

from simvlg_jax.caption import read_or_explain
from simvlg_jax.demo.looks import Looks, Say, Written
from simvlg_jax.evaluation.report.merge_map import merge_map, sheet_layout
from simvlg_jax.evaluation.report.page import render
from simvlg_jax.evaluation.report.pictures import picture_text, sheet_text
from simvlg_jax.utils.errors import UserError

NO_QUESTION = "Write a question first."
draw = functools.partial(render, package=__package__)

Tried = dict[tuple[str, int], Written]  # the captions of a picture, by its path and the number of visual tokens


def message(text: str) -> str:
    return f'<p class="message" role="status">{escape(text)}</p>'


def nothing_yet(looks: Looks) -> str:
    """What the page says before it has a picture or a clip."""
    return f"Drop a {looks.kind} first."


def look(looks: Looks, path: str | None, tokens: int, tried: Tried, say: Say) -> tuple[str, Tried]:
    """Returns what a model makes of a picture, and `tried` with its caption and without those of other pictures.

    Args:
      path: of the picture, None if there is none.
      tokens: number of visual tokens.
    """
    try:
        image = _read(looks, path)
        shown = looks.caption(image, tokens, say)
    except UserError as error:
        return message(str(error)), {}
    tried = {key: written for key, written in tried.items() if key[0] == path} | {(path, tokens): shown}
    layers = looks.layers(image, shown.text, tokens, say)
    rows, columns = sheet_layout(len(image) if image.ndim == 4 else 1)
    html = draw(
        "look.html.j2",
        looks=looks,
        shown=shown,
        tried=[tried[key] for key in sorted(tried, reverse=True)],
        device=jax.devices()[0].device_kind,
        rows=rows,
        columns=columns,
        image=picture_text(image) if image.ndim == 3 else sheet_text(image),
        drawing=merge_map(layers, len(image) if image.ndim == 4 else 1) if layers else None,
    )
    return html, tried


def answer(looks: Looks, path: str | None, question: str, tokens: int, say: Say) -> str:
    """Returns the answer to a question about a picture. Arguments as for `look`."""
    try:
        image = _read(looks, path)
        if not question.strip():
            raise UserError(NO_QUESTION)
        written = looks.answer(image, question, tokens, say)
    except UserError as error:
        return message(str(error))
    return draw("answer.html.j2", question=question, written=written)


def _read(looks: Looks, path: str | None) -> np.ndarray:
    """Returns the picture or clip as a model sees it, see `read_visual`. Raises UserError if it cannot be read."""
    if not path:
        raise UserError(nothing_yet(looks))
    image = read_or_explain(Path(path), looks.shape)
    if isinstance(image, str):
        raise UserError(image[0].upper() + image[1:])
    return image
