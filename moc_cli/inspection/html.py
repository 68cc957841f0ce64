"""One self-contained page, routing.html: the same pictures to point at, and the tables.

The page holds routing.json whole, fetches nothing (its policy forbids it) and builds no markup from
data, so a task's name may hold any letters.
"""

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_hex

from moc_cli.files import to_plain
from moc_cli.inspection.captions import source, subtitle
from moc_cli.inspection.pictures_style import differences, shares

STEPS = 129  # colours of a scale; odd, so that a difference of 0 has its own
SCRIPTS = ("routing.js", "routing_more.js")


def page(routing: dict[str, Any]) -> str:
    """Return the whole page for the dict of routing.json."""
    style = _read("routing.css")
    script = "\n".join(_read(name) for name in SCRIPTS)
    parts = {
        "policy": escape(policy(style, script)),
        "title": escape(f"Routing of {subtitle(routing)}"),
        "subtitle": escape(subtitle(routing)),
        "source": escape(source(routing)),
        "style": style,
        "look": embedded(_look()),
        "script": script,
        "routing": embedded(routing),
    }
    # Cut the template first: what is put in is never searched for the next place.
    pieces = _read("routing.html").split("{{")
    text = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        text += [parts[name], rest]
    return "".join(text)


def policy(style: str, script: str) -> str:
    """Return the content security policy: this style and this script, and nothing else at all."""
    allowed = f"script-src '{_digest(script)}'; style-src '{_digest(style)}'"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def embedded(value: Any) -> str:
    """Return JSON that may stand inside a script element: no letter of it can end the element."""
    text = json.dumps(_short(to_plain(value)), separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _short(value: Any) -> Any:
    """Return the value with whole floats as integers: most numbers here are 0.0."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _look() -> dict[str, list[str]]:
    """Return the pictures' colours for a light page, and those that read well on a dark one."""
    dark = shares().reversed()
    middle = ["#9ecae1", "#4292c6", "#16487c", "#262b34", "#8a3018", "#e0694a", "#fddbc7"]
    return {
        "share": _colours(shares()),
        "share_dark": _colours(dark, first=0.12),
        "difference": _colours(differences()),
        "difference_dark": _colours(LinearSegmentedColormap.from_list("dark", middle)),
    }


def _colours(colours: Colormap, first: float = 0.0) -> list[str]:
    return [to_hex(colours(place)) for place in np.linspace(first, 1.0, STEPS)]


def _digest(text: str) -> str:
    """Return a policy's word for an inline element: the hash of exactly its text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _read(name: str) -> str:
    return files("moc_cli.inspection").joinpath(name).read_text(encoding="utf-8")
