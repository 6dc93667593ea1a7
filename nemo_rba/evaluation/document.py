# SPDX-License-Identifier: Apache-2.0
"""A page of headings, paragraphs, tables and figures, written once and rendered as Markdown and as HTML.

The HTML needs no other file: figures are embedded. The Markdown refers to PNG files beside it.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

STYLE = """
body { font: 16px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1f2328; background: #fff;
       max-width: 60rem; margin: 3rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .6rem; }
p, li { max-width: 46rem; }
p.lead { font-size: 1.15rem; margin: 0 0 .6rem; }
.scroll { overflow-x: auto; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eaecef; }
th { border-bottom: 1.5px solid #57606a; font-weight: 600; }
table.numbers th:not(:first-child), table.numbers td:not(:first-child) { text-align: right;
       padding: .35rem 0 .35rem 1.6rem; }
table.numbers td { white-space: nowrap; }
figure { margin: 1rem 0 1.4rem; }
img { max-width: 100%; height: auto; }
figcaption { color: #57606a; font-size: .85rem; }
"""


class Strong(str):
    """Words to be set in bold."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Heading:
    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    text: str
    is_lead: bool = False


@dataclass(frozen=True, slots=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Table:
    """``is_numeric`` aligns all columns but the first to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_numeric: bool = True


@dataclass(frozen=True, slots=True)
class Figure:
    name: str  # of the file, without suffix
    png: bytes
    caption: str


@dataclass(frozen=True, slots=True)
class Link:
    """A line that leads to a file beside the document."""

    text: str
    file: str


Block = Heading | Paragraph | Bullets | Table | Figure | Link


def write_document(folder: Path, name: str, title: str, blocks: Sequence[Block]) -> None:
    """``<folder>/<name>.html``, ``<folder>/<name>.md`` and the figures ``<folder>/plots/*.png`` of the latter."""
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        if isinstance(block, Figure):
            (plots / f"{block.name}.png").write_bytes(block.png)
    markdown = "\n\n".join([f"# {_md(title)}", *(_to_markdown(block) for block in blocks)])
    (folder / f"{name}.md").write_text(markdown + "\n", encoding="utf-8")
    body = "\n".join(_to_html(block) for block in blocks)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )
    (folder / f"{name}.html").write_text(page, encoding="utf-8")


def _to_markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {_md(text)}"
        case Paragraph(text, is_lead):
            return f"**{_md(text)}**" if is_lead else _md(text)
        case Bullets(items):
            return "\n".join(f"- {_md(item)}" for item in items)
        case Table(header, rows, is_numeric):
            rule = ["---", *(["---:" if is_numeric else "---"] * (len(header) - 1))]
            lines = [[_md(cell) for cell in header], rule, *([_md(cell) for cell in row] for row in rows)]
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
        case Figure(name, _, caption):
            return f"![{_md(caption)}](plots/{name}.png)\n\n{_md(caption)}"
        case Link(text, file):
            return f"[{_md(text)}]({quote(file)})"


def _to_html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Paragraph(text, is_lead):
            return f"<p{' class=lead' if is_lead else ''}>{html.escape(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"
        case Table(header, rows, is_numeric):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            body = "\n".join("<tr>" + "".join(_html_cell(cell) for cell in row) + "</tr>" for row in rows)
            kind = " class=numbers" if is_numeric else ""
            return f"<div class=scroll><table{kind}>\n<tr>{head}</tr>\n{body}\n</table></div>"
        case Figure(_, png, caption):
            data = base64.b64encode(png).decode()
            alt = html.escape(caption, quote=True)
            return (
                f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{alt}</figcaption></figure>'
            )
        case Link(text, file):
            return f'<p><a href="{quote(file)}">{html.escape(text)}</a></p>'


def _html_cell(cell: str) -> str:
    text = html.escape(cell)
    return f"<td><strong>{text}</strong></td>" if isinstance(cell, Strong) else f"<td>{text}</td>"


def _md(text: str) -> str:
    """Literal text for Markdown: nothing in an answer may open emphasis, a link, a tag or a new cell."""
    literal = re.sub(r"([\\|*_`<>]|(?<=\])\()", r"\\\1", " ".join(text.split()))
    return f"**{literal}**" if isinstance(text, Strong) else literal
