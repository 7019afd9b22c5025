"""A report as one HTML page: all that the Markdown says, nothing loaded, nothing of others live."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grasp_kernels.pages.chart import Line, line_chart
from grasp_kernels.pages.markdown import answers_table
from grasp_kernels.pages.page import page

HOSTILE = (
    "<script>alert(1)</script>",
    "![x](https://example.com/x.png)",
    "[here](javascript:alert(1))",
    "<https://example.com>",
    "`</style><b>` | cell",
    "# heading",
    "\x1b[31mred",
    "&lt;b&gt;",
)


def answer(text: str, unlikely: bool = False, changed: bool = False) -> dict[str, object]:
    return {"prompt": "why?", "base": "so.", "adapter": [[text, unlikely]], "changed": changed}


class Seen(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text: str) -> None:
        self.text += text


def drawn() -> str:
    """A chart with a name that could be HTML."""
    lines = [Line("<b>", "#d62728", [0, 5, 10], [2.0, 1.0, 4.0])]
    return line_chart([*lines, lines[0]._replace(label="pale", is_pale=True)], "steps", "loss")


def test_a_page_holds_the_tables_and_names_each_column() -> None:
    rows = [answer("Go away.", unlikely=True, changed=True), answer("Well.")]
    text = "# The title\n\n## Part\n\n" + answers_table({"naive LoRA": rows}) + "\n"
    seen = Seen(page(text, {}))
    cells = [attributes for tag, attributes in seen.tags if tag == "td"]
    assert [cell["data-column"] for cell in cells] == 2 * ["prompt", "base model", "naive LoRA"]
    assert [cell.get("class") for cell in cells] == [None, None, "changed", None, None, None]
    assert ("strong", {}) in seen.tags
    assert "The title" in seen.text
    for word in ("prompt", "base model", "why?", "so.", "Go away.", "≠", "Well."):
        assert word in seen.text


def test_tables_of_other_widths_follow_each_other() -> None:
    text = "# T\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n| c |\n| --- |\n| 3 |\n"
    seen = Seen(page(text, {}))
    assert [a["data-column"] for tag, a in seen.tags if tag == "td"] == ["a", "b", "c"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_others_wrote_is_text(hostile: str) -> None:
    """As it comes from an adapter's answers, and even where something forgot to make it inert."""
    table = answers_table({"naive LoRA": [answer(hostile)]})
    for text in (f"# T\n\n{table}\n", f"# T\n\nSaid: {hostile}\n"):
        html = page(text, {})
        seen = Seen(html)
        assert {tag for tag, _ in seen.tags} <= {
            *("html", "head", "meta", "title", "style", "body", "main", "h1", "p", "code"),
            *("table", "thead", "tbody", "tr", "th", "td"),
        }
        assert not any({"href", "src", "onload"} & attributes.keys() for _, attributes in seen.tags)
        assert "\x1b" not in html or "\x1b" in text


def test_a_text_without_a_heading_has_a_title() -> None:
    assert "<title>Report</title>" in page("words", {})


def test_a_chart_holds_lines_axes_and_names_as_text() -> None:
    seen = Seen(chart := drawn())
    points = [dict(a)["points"].split() for tag, a in seen.tags if tag == "polyline"]
    assert points[0] == points[1] and len(points[0]) == 3
    xs, ys = zip(*(map(float, pair.split(",")) for pair in points[0]), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[1] - ys[0] == pytest.approx((ys[0] - ys[2]) / 2, abs=0.2)  # down is large
    for text in ("steps", "loss", "<b>", "10", "4"):
        assert f">{text.replace('<', '&lt;').replace('>', '&gt;')}<" in chart
    assert "pale" not in chart
    assert set(re.findall(r"https?://[^\"]+", chart)) == {"http://www.w3.org/2000/svg"}
    assert line_chart([], "steps", "loss").startswith("<svg")


def test_a_figure_stands_in_the_page() -> None:
    html = page("# T\n\n![caption](figure.svg)\n", {"figure.svg": drawn()})
    assert drawn() in html


def test_a_browser_shows_it_and_asks_for_nothing(tmp_path: Path) -> None:
    """Chromium renders it and, beside the file itself, loads nothing."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium here")
    rows = [answer("Go away.", unlikely=True, changed=True)]
    text = f"# The title\n\n{answers_table({'naive LoRA': rows})}\n\n![c](figure.svg)\n"
    (tmp_path / "report.html").write_text(page(text, {"figure.svg": drawn()}), encoding="utf-8")
    found = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={tmp_path / 'shot.png'}",
            "--window-size=500,700",
            "--enable-logging=stderr",
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (tmp_path / "shot.png").read_bytes().startswith(b"\x89PNG"), found.stderr[-500:]
    assert "Content Security Policy" not in found.stderr  # it reports what a page tried to load
    from PIL import Image

    colours = Image.open(tmp_path / "shot.png").convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert (253, 236, 234) in {colour for _, colour in colours}  # the changed answer is marked
