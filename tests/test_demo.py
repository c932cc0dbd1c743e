"""The demo: what it shows of a picture, its errors, and its page in a real browser."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from browser import watch
from jax import monitoring
from PIL import Image
from verbs import call

from simvlg_jax.config.load import load_config
from simvlg_jax.config.saved import save_config
from simvlg_jax.convert import own_files
from simvlg_jax.demo import __main__ as demo
from simvlg_jax.demo import views
from simvlg_jax.demo.looks import Looks
from simvlg_jax.evaluation.caption_model import CaptionModel
from simvlg_jax.models.token_merging import token_counts
from simvlg_jax.parallel.mesh import make_mesh
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks import params as partition
from simvlg_jax.training.plan import Plan
from simvlg_jax.training.restore import WEIGHTS
from simvlg_jax.utils.errors import UserError

FLAGS = ["--config.mesh.data=1", "--config.llm.max_text_tokens=60", "--config.evaluate.min_new_tokens=4"]
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
GRADIO_SAYS = "Method not implemented."  # in the console, whenever it closes a connection to its server
START_SECONDS, WAIT_SECONDS = 120, 60


def model_of(*flags: str) -> CaptionModel:
    config = load_config("configs/tiny.py", [*FLAGS, *flags])
    task = build_task(config)
    return CaptionModel(config, task, partition.join(*Plan(task, config, make_mesh(config.mesh)).init_params()))


@pytest.fixture(scope="module")
def model() -> CaptionModel:
    return model_of()


@pytest.fixture(scope="module")
def looks(model) -> Looks:
    return Looks(model)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Returns the paths of two pictures and of a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.fromarray(IMAGE).save(folder / "picture.png")
    Image.fromarray(255 - IMAGE).resize((90, 40)).save(folder / "other.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.fixture
def compiled():
    """Returns a list that every compiled program is added to."""
    programs = []

    def listen(event: str, seconds: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(details)

    monitoring.register_event_duration_secs_listener(listen)
    yield programs
    monitoring.unregister_event_duration_listener(listen)


def silent(share: float, text: str) -> None:
    assert 0 <= share <= 1 and text


def test_the_slider_ends_where_the_connector_can_merge_no_more_or_no_less(model, looks):
    assert (looks.least, looks.own, looks.most, looks.patches) == (5, 7, 17, 16)
    for tokens in (looks.least, looks.most):
        assert token_counts(17, model.with_merging(tokens=tokens).task.model.connector.merges)[-1] == tokens
    for tokens in (looks.least - 1, looks.most + 1):
        with pytest.raises(UserError, match="cannot become"):
            model.with_merging(tokens=tokens)


def test_another_number_of_tokens_gives_the_model_of_that_schedule(model, looks):
    assert looks.caption(IMAGE, looks.own, silent).text == model.caption(IMAGE)
    other = model.with_merging(tokens=12)
    written = looks.caption(IMAGE, 12, silent)
    assert written.text == other.caption(IMAGE) and written.tokens == 12 and written.seconds > 0
    layers = looks.layers(IMAGE, written.text, 12, silent)
    assert layers[-1].max() + 1 == 12
    assert np.array_equal(layers, other.explain(IMAGE, written.text).layers)
    assert looks.answer(IMAGE, "Why?", 12, silent).text == other.answer(IMAGE, "Why?")


def test_each_number_of_tokens_is_compiled_once(looks, compiled):
    said = []

    def all_of(tokens: int) -> None:
        written = looks.caption(IMAGE, tokens, lambda _, text: said.append(text))
        looks.layers(IMAGE, written.text, tokens, lambda _, text: said.append(text))

    all_of(9)
    assert compiled and said[0] == "compiling for 9 visual tokens (once)"
    all_of(12)
    compiled.clear()
    said.clear()
    for tokens in (9, 12, 9):
        all_of(tokens)
    assert compiled == [] and not any("compiling" in text for text in said)


def test_a_look_shows_every_layer_and_all_numbers_that_were_tried(looks, files):
    html, tried = views.look(looks, files["picture"], looks.own, {}, silent)
    assert re.findall(r"layer (\d): <b>(\d+)</b> tokens", html) == [("1", "12"), ("2", "7")]
    html, both = views.look(looks, files["picture"], 12, tried, silent)
    assert re.findall(r"<td>(\d+)</td>", html) == ["12", "7"] and tried.items() < both.items()
    assert html.count('class="map"') == 2 and html.count('class="shown"') == 1
    html, _ = views.look(looks, files["other"], 12, both, silent)
    assert re.findall(r"<td>(\d+)</td>", html) == ["12"]


def test_texts_are_escaped(looks, files, monkeypatch):
    monkeypatch.setattr(CaptionModel, "caption", lambda *_: "<b>&")
    monkeypatch.setattr(CaptionModel, "answer", lambda *_: "<i>&")
    html, _ = views.look(looks, files["picture"], 7, {}, silent)
    assert '<p class="said">&lt;b&gt;&amp;</p>' in html
    html = views.answer(looks, files["picture"], "<u>?", 7, silent)
    assert "&lt;i&gt;&amp;" in html and "&lt;u&gt;?" in html and "<u>" not in html


def test_wrong_input_gives_a_message(looks, files):
    for path, tokens, text in (
        (None, 7, "Drop a picture first."),
        (files["broken"], 7, "Cannot read this picture: not a picture"),
        (files["picture"], 18, "17 tokens cannot become 18"),
    ):
        look, answer = views.look(looks, path, tokens, {}, silent)[0], views.answer(looks, path, "Why?", tokens, silent)
        for html in (look, answer):
            assert html.startswith('<p class="message"') and text in html
    assert views.NO_QUESTION in views.answer(looks, files["picture"], " \n", 7, silent)


def test_the_command_refuses_what_it_cannot_do(monkeypatch, capsys):
    def error(*arguments) -> tuple[int, str]:
        return call(demo, "--example", *arguments), capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert error("--port", port) == (
            1,
            f"error: port {port} is taken, perhaps by another demo: choose another one with --port\n",
        )
    assert error("--port", 70000) == (2, "error: --port is 70000; it must be between 1 and 65535\n")
    status, text = error("--host", "192.0.2.1", "--port", free_port())
    assert status == 1 and text.startswith("error: cannot listen on 192.0.2.1:") and text.count("\n") == 1
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert error("--port", free_port()) == (1, "error: the demo needs Gradio: pip install 'simvlg_jax[demo]'\n")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def served(model, folder):
    """Runs the command on a model, and stops it like Ctrl-C."""
    save_config(model.config, folder)
    own_files.write_tree(folder / WEIGHTS, model.params)
    port, log, temporary = free_port(), folder / "log", folder / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "simvlg_jax.demo", "--workdir", str(folder), "--port", str(port)]
    with open(log, "w") as out:
        running = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"TMPDIR": str(temporary)})
    try:
        ready, end = f"open http://127.0.0.1:{port} in a browser", time.monotonic() + START_SECONDS
        while ready not in log.read_text():
            assert running.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        running.send_signal(signal.SIGINT)
        assert running.wait(WAIT_SECONDS) == 0
        assert "Traceback" not in log.read_text()
        assert not list(temporary.glob("simvlg_jax_demo_*"))
    finally:
        running.kill()
        running.wait()


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    pytest.importorskip("gradio")
    with served(model, tmp_path_factory.mktemp("demo")) as address:
        yield address


@pytest.fixture
def page(browser, address):
    with opened(browser, address, "Drop a picture first.") as page:
        yield page


@contextlib.contextmanager
def opened(browser, address: str, said_first: str):
    """Opens the page. After the test, the console is empty, and only this machine was asked for anything."""
    context, said, requested = browser.new_context(viewport={"width": 1280, "height": 1000}), [], []
    page = context.new_page()
    page.set_default_timeout(WAIT_SECONDS * 1000)
    watch(page, said, requested)
    page.goto(address)
    page.get_by_text(said_first).wait_for()
    yield page
    context.close()
    assert [text for text in said if text != GRADIO_SAYS] == []
    assert [url for url in requested if not url.startswith((address, "data:", "blob:"))] == []


def upload(page, path: str) -> None:
    page.locator("input[type=file]").first.set_input_files(path)


def tried(page) -> list[int]:
    """Returns the numbers of tokens in the table of captions."""
    return [int(text) for text in page.locator("#look td:first-child").all_inner_texts()]


def test_a_picture_gets_captions_from_any_number_of_tokens_and_an_answer(page, files):
    upload(page, files["picture"])
    page.locator("#look .said").wait_for()
    first = page.locator("#look .said").inner_text()
    assert first and tried(page) == [7] and page.locator("#look .map").count() == 2

    page.locator("textarea").fill("What is it?")
    page.get_by_role("button", name="Ask").click()
    page.locator("#answer .said").wait_for()
    assert page.locator("#answer .said").inner_text()
    assert "What is it? · 7 visual tokens" in page.locator("#answer small").inner_text()

    slider = page.locator("#tokens input[type=range]")
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 6, middle)  # where 7 is between 5 and 17
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, middle, steps=5)
    page.mouse.up()
    page.get_by_text("compiling for 11 visual tokens (once)").wait_for()
    slider.focus()
    page.keyboard.press("End")
    page.locator("#look td", has_text=re.compile("^17$")).wait_for()
    assert tried(page) == [17, 11, 7] and page.locator("#look .cost .count").inner_text() == "17"
    assert page.locator("#look figcaption").last.inner_text() == "layer 2: 17 tokens"

    upload(page, files["other"])
    page.locator("#look tr:nth-child(3)").wait_for(state="detached")
    page.locator("#look .said").wait_for()
    assert tried(page) == [17] and page.locator("#answer").inner_text() == ""


def test_wrong_input_gives_a_short_message_in_the_page(page, files):
    page.get_by_role("button", name="Ask").click()
    page.locator("#answer .message", has_text="Drop a picture first.").wait_for()
    upload(page, files["broken"])
    page.locator("#look .message", has_text="Cannot read this picture").wait_for()
    page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
    page.locator("#look .message", has_text="Drop a picture first.").wait_for()
    upload(page, files["picture"])
    page.locator("#look .said").wait_for()
    page.get_by_role("button", name="Ask").click()
    page.locator("#answer .message", has_text=views.NO_QUESTION).wait_for()
    assert "Traceback" not in page.content()


def test_a_clip_is_captioned_and_shown_with_all_of_its_frames(browser, tmp_path):
    pytest.importorskip("gradio")
    pytest.importorskip("av")
    from preparing import write_videos

    clip = write_videos(tmp_path / "clips", 1) / "0.mp4"
    flags = ("data.frames=4", "video.frames_as=merged", "evaluate.repetition_penalty=9.0")  # or it says only spaces
    model = model_of(*(f"--config.{flag}" for flag in flags))
    with served(model, tmp_path / "demo") as address, opened(browser, address, "Drop a clip first.") as page:
        upload(page, str(clip))
        page.locator("#look .said").wait_for()
        said = page.locator("#look .said").inner_text()
        assert said == model.caption(str(clip)).strip() and said != "(nothing)"
        assert "64 patches" in page.locator("#look figcaption").first.inner_text()
        assert tried(page) == [7] and page.locator("#look .map").count() == 2
