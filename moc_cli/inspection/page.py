"""One self-contained page, routing.html: the figures with their values as tooltips, and tables.

The page has no script and fetches nothing: its policy allows its own style and inlined images only.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any
from xml.etree import ElementTree

import numpy as np

from moc_cli.inspection.captions import source, subtitle
from moc_cli.report.figure_style import FigureFrame
from moc_cli.report.routing import control_rows, site_rows, summary_rows

TOKENS = 200  # of a text at most; all are in routing.json


def build_page(routing: dict[str, Any], figures: Mapping[str, tuple[FigureFrame, bytes]]) -> str:
    """Return the page for the dict of routing.json and its figures by name, each with its SVG."""
    parts = [
        f'<section id="{name}" aria-label="{escape(frame.title)}">\n'
        f"{inline_svg(svg, frame, name)}\n{listing(frame)}\n</section>"
        for name, (frame, svg) in figures.items()
    ]
    links = {name: frame.title for name, (frame, _) in figures.items()}
    tables = {
        "summary": ("Summary", table(*summary_rows(routing))),
        "sites": ("Sites", table(*site_rows(routing))),
        "controls": ("Controls", table(*control_rows(routing))),
    }
    if routing["tokens"]:
        tables = {"tokens": ("Votes of the text's tokens", token_table(routing)), **tables}
    for name, (title, content) in tables.items():
        parts.append(f'<section id="{name}">\n<h2>{title}</h2>\n{content}\n</section>')
        links[name] = title
    warnings = [
        f'<p class="warning">Warning: {escape(warning["message"])}</p>'
        for warning in routing["warnings"]
    ]
    style = read("page.css")
    return Template(read("page.html")).substitute(
        policy=policy(style),
        title=escape(f"Routing of {subtitle(routing)}"),
        style=style,
        source=escape(source(routing)),
        links="\n".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in links.items()),
        sections="\n".join([*warnings, *parts]),
    )


def read(name: str) -> str:
    """Return the text of a file of this folder."""
    return files("moc_cli.inspection").joinpath(name).read_text(encoding="utf-8")


def policy(style: str) -> str:
    """Return the content security policy: this style, images inside the page, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return escape(f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'")


def inline_svg(svg: bytes, frame: FigureFrame, name: str) -> str:
    """Return the SVG as an element of the page: a title on every value, no identifier twice.

    Styles become attributes, which the page's policy allows.
    """
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r"#([\w-]+)", svg.decode()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.items()}
        style = attributes.pop("style", "")
        attributes |= dict(part.strip().split(": ", 1) for part in style.split(";") if part.strip())
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        element.attrib.clear()
        for key, value in attributes.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href" and value.startswith("#"):
                value = f"#{name}-{value[1:]}"
            element.set(key, value.replace("url(#", f"url(#{name}-"))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img"}
    root.set("aria-label", f"{frame.title}. {frame.caption}")
    group = ElementTree.SubElement(root, "g", {"class": "values"})
    to_figure = frame.figure.transFigure.inverted()
    for axes in dict.fromkeys(tip.axes for tip in frame.tooltips):
        tips = [tip for tip in frame.tooltips if tip.axes is axes]
        corners = np.array([tip.box for tip in tips]).reshape(-1, 2)  # in the axes' data
        places = to_figure.transform(axes.transData.transform(corners))  # (0, 0) is at the bottom
        boxes = ((np.array([0, 1]) + np.array([1, -1]) * places) * (width, height)).reshape(-1, 4)
        for tip, (left, top, right, bottom) in zip(tips, boxes.tolist(), strict=True):
            path = f"M{left:.1f} {top:.1f}H{right:.1f}V{bottom:.1f}H{left:.1f}z"
            mark = ElementTree.SubElement(group, "path", {"d": path})
            ElementTree.SubElement(mark, "title").text = f"{tip.row} {tip.text}"
    return ElementTree.tostring(root, encoding="unicode")


def listing(frame: FigureFrame) -> str:
    """Return a figure's values as a folded table: a line for each row of the figure."""
    rows: dict[str, list[str]] = {}
    for tip in frame.tooltips:
        texts = rows.setdefault(tip.row, [])
        if tip.listed:
            texts.append(tip.text)
    cells = ((row, "; ".join(texts)) for row, texts in rows.items() if texts)
    note = "Values as text; what is 0 is left out"
    return f"<details><summary>{note}</summary>{table((), cells, 'listing')}</details>"


def token_table(routing: dict[str, Any]) -> str:
    """Return each token's vote at every site, with its probability; ✓ where it was chosen."""
    tokens, names = routing["tokens"], [site["name"] for site in routing["sites"]]
    shown = tokens["tokens"][:TOKENS]
    choices = tokens["choice"]
    width = len(choices[0]) // len(tokens["tokens"]) if routing["level"] == "token" else 0
    rows = []
    for number, token in enumerate(shown):
        cells = [token]
        for site, choice in enumerate(choices):
            vote = tokens["votes"][site][number]
            site_choice = choice[number * width : (number + 1) * width] if width else choice
            mark = " ✓" if vote in site_choice else ""
            cells.append(f"{names[vote]} {100 * tokens['probability'][site][number]:.1f} %{mark}")
        rows.append(cells)
    if not width:
        chosen = [", ".join(names[control] for control in choice) for choice in choices]
        rows.append(["chosen", *chosen])
    rows.append(["lead", *(f"{margin:.4f}" for margin in tokens["margin"])])
    note = (
        "A token's most probable control, and how probable it is. ✓: the site chose it; lead: in "
        "mean probability."
    )
    if len(shown) < len(tokens["tokens"]):
        note += f" The first {TOKENS} of {len(tokens['tokens'])} tokens."
    return f"<p>{note}</p>{table(['token', *names], rows)}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table; the first cell of a row is its heading."""
    columns = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    lines = [
        f'<tr><th scope="row">{escape(heading)}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in cells)
        + "</tr>"
        for heading, *cells in rows
    ]
    top = f"<thead><tr>{columns}</tr></thead>" if head else ""
    body = "\n".join(lines)
    return (
        f'<div class="table {kind}" tabindex="0"><table>{top}<tbody>\n{body}\n'
        "</tbody></table></div>"
    )
