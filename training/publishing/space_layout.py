"""Layout of the search page: a gradio page around `SearchPage`.

This file imports nothing from oner, because it is copied unchanged into Spaces, beside the files of `SearchPage`.
"""

from pathlib import Path
from typing import Any

USERS = 20  # concurrent requests; further ones wait in the queue
MOST = 60
# only fonts that a browser need not download
FONTS = ["system-ui", "sans-serif"]
# captions are shown in full below their pictures, and the gallery grows with its content
CSS = """
#answers .grid-wrap { max-height: none; min-height: 0; height: auto; }
#answers .gallery-item { height: auto; }
#answers .thumbnail-item { aspect-ratio: auto; height: 100%; overflow: visible; }
#answers .thumbnail-item { display: flex; flex-direction: column; }
#answers .thumbnail-item img { aspect-ratio: 1; height: auto; }
#answers .caption-label { position: static; max-width: 100%; white-space: normal; border: none; text-align: left; }
#answers .caption-label { opacity: 1 !important; }
@media (max-width: 700px) { #answers .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)); } }
"""


def build_page(page: Any, title: str = "Search by words, by a picture, or by both", model: str | None = None) -> Any:
    """
    The page as a `gradio.Blocks`, served by its `launch`; `look` returns further arguments of `launch`.

    Args:
        page: A `SearchPage`.
        model: Displayed name of the model; its name or directory if None.

    Raises:
        ImportError: gradio is missing; the message names the extra to install.
    """
    gr = import_gradio()

    def search(index: str, words: str, picture: str | None, count: float) -> tuple[Any, ...]:
        if not (words or "").strip() and picture is None:
            return gr.Gallery([], selected_index=None), "Enter words, a picture, or both.", None, None, None, ""
        try:
            answer = page.search(index, words, picture, int(count))
        except ValueError as error:
            raise gr.Error(without_folder(str(error), picture)) from error
        shown = [(page.preview(one.item), f"{one.score:+.3f}  {one.name}") for one in answer.found]
        return gr.Gallery(shown, selected_index=None), answer.remark, answer, None, None, ""

    def locate(answer: Any, event: gr.SelectData) -> tuple[Any, ...]:
        if answer is None or event.index >= len(answer.found):
            return None, None, ""
        one = answer.found[event.index]
        try:
            located = page.locate(answer.words, one.item)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        facts = [f"**{event.index + 1}.** {plain(one.name)}", f"cosine {one.score:+.4f}", plain(one.place)]
        return located.picture, located.map, "  \n".join([*filter(None, facts), located.remark])

    names = page.sizes
    choices = [(f"{name} ({size})", name) for name, size in names.items()]
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        answering = plain(model or page.model_name)
        gr.Markdown(f"## {title}\nAnswered by {answering}. Click an answer to see where the words are.")
        answered = gr.State(time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                index = gr.Dropdown(choices, value=next(iter(names)), label="Index", elem_id="index")
                words = gr.Textbox(label="Words", placeholder="a red apple", max_length=1000, elem_id="words")
                picture = gr.Image(
                    label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=180,
                    elem_id="picture",
                )  # fmt: skip
                count = gr.Slider(1, MOST, value=12, step=1, label="Answers", elem_id="count")
                ask = gr.Button("Search", variant="primary", elem_id="ask")
            with gr.Column(scale=3):
                remark = gr.Markdown(elem_id="remark")
                gallery = gr.Gallery(
                    show_label=False, columns=6, object_fit="contain", allow_preview=False, format="png", buttons=[],
                    elem_id="answers",
                )  # fmt: skip
                with gr.Row():
                    chosen = gr.Image(label="Answer", interactive=False, height=280, buttons=[], elem_id="chosen")
                    where = gr.Image(
                        label="Where the words are", interactive=False, height=280, buttons=[], elem_id="where"
                    )
                facts = gr.Markdown(elem_id="facts")
        asked = [index, words, picture, count]
        shown = [gallery, remark, answered, chosen, where, facts]
        gr.on([ask.click, words.submit, index.change], search, asked, shown, api_name="search")
        gallery.select(locate, [answered], [chosen, where, facts], api_name=False)
    return blocks.queue(default_concurrency_limit=USERS)


def look() -> dict[str, Any]:
    """Arguments of `launch` for theme and style."""
    gr = import_gradio()
    return {"theme": gr.themes.Default(font=FONTS, font_mono=["monospace"]), "footer_links": [], "css": CSS}


def import_gradio() -> Any:
    """Imports gradio, only when a page is built. Raises `ImportError` with the extra to install."""
    try:
        import gradio
    except ImportError as error:
        raise ImportError("a search page needs gradio: pip install 'oner[serve]'") from error
    return gradio


def without_folder(message: str, picture: str | None) -> str:
    """The message with only the file name of an upload, not its path on the server."""
    return message if picture is None else message.replace(picture, Path(picture).name)


def plain(text: str) -> str:
    """Escapes a text so that Markdown and HTML show it unchanged."""
    return "".join(f"&#{ord(letter)};" if letter in "\\`*_{}[]()<>#+!|~$&" else letter for letter in text)
