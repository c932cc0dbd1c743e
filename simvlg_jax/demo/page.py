"""The page of the demo, in Gradio. It asks nothing of other machines: no analytics, and the fonts of the system."""

import gradio as gr

from simvlg_jax.demo import views
from simvlg_jax.demo.looks import Looks, Say

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
CODE_FONT = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")
# Gradio tells of a new value of a slider when the pointer leaves it. The same for keys, when the key is up.
KEYS = """() => document.addEventListener("keyup", ({target, key}) => {
  if (!target.matches("#tokens input")) return;
  if (target.type === "number") { if (key === "Enter") target.blur(); }
  else if (/^(Arrow|Page|Home|End)/.test(key)) target.dispatchEvent(new PointerEvent("pointerup", {bubbles: true}));
})"""


def build(looks: Looks, name: str, note: str) -> gr.Blocks:
    """Returns the page of a model.

    Args:
      name: of the model.
      note: what a person should know of it, or "".
    """

    def look(path, tokens, tried, progress=gr.Progress()):  # noqa: B008 (Gradio finds it by the default)
        return views.look(looks, path, tokens, tried, _sayer(progress))

    def answer(path, question, tokens, progress=gr.Progress()):  # noqa: B008
        return views.answer(looks, path, question, tokens, _sayer(progress))

    # One computation at a time: two would slow each other down, and their times would mean nothing.
    alone = dict(concurrency_id="model", concurrency_limit=1, api_visibility="private")
    with gr.Blocks(title=f"SimVLG · {name}", analytics_enabled=False, fill_width=True) as page:
        tried = gr.State({})
        gr.HTML(views.draw("head.html.j2", name=name, note=note, looks=looks))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                sources = ["upload"] if looks.shape.frames else ["upload", "clipboard"]
                widget = gr.Video if looks.shape.frames else gr.Image
                picture = widget(label=looks.kind.capitalize(), sources=sources, height=300, buttons=[])
                # The file as it was uploaded: Gradio's own method raises an error for one that is no picture.
                picture.preprocess = lambda payload: payload and payload.path
                tokens = gr.Slider(
                    looks.least,
                    looks.most,
                    looks.own,
                    step=1,
                    label="Visual tokens",
                    elem_id="tokens",
                    visible=looks.merges,
                )
                question = gr.Textbox(
                    label="Question", placeholder="What is it?", submit_btn="Ask", max_lines=3, elem_id="question"
                )
                answered = gr.HTML(elem_id="answer")
            with gr.Column(scale=5, min_width=300):
                looked = gr.HTML(views.message(views.nothing_yet(looks)), elem_id="look", min_height=180)
        shown = dict(inputs=[picture, tokens, tried], outputs=[looked, tried], show_progress_on=looked)
        shown["trigger_mode"] = "always_last"  # what is chosen during a computation is shown after it
        picture.change(lambda: "", None, answered, queue=False, api_visibility="private")
        picture.change(look, **shown, **alone)
        tokens.release(look, **shown, **alone)
        question.submit(answer, [picture, question, tokens], answered, **alone)
    return page


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serves the page in threads of this process.

    Raises:
      OSError: the port is taken, or the host is not an address of this machine.
    """
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        inbrowser=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        max_file_size="100mb",
        theme=_theme(),
        css=views.draw("style.css.j2"),
        js=KEYS,
    )


def _theme() -> gr.themes.Default:
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=CODE_FONT)
    soft, soft_on_dark = "*neutral_500", "*neutral_400"  # Gradio's own are hard to read
    return theme.set(
        body_text_color_subdued=soft,
        body_text_color_subdued_dark=soft_on_dark,
        block_info_text_color=soft,
        block_info_text_color_dark=soft_on_dark,
    )


def _sayer(progress: gr.Progress) -> Say:
    return lambda share, text: progress(share, desc=text)
