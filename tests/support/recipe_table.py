"""The table of recipe keys in REFERENCE.md.

Written again by `PYTHONPATH=tests python -m support.recipe_table`.
"""

from itertools import groupby

from support.machine import ROOT

from moc_cli.recipe.reference import Key, keys

REFERENCE = ROOT / "REFERENCE.md"
BEGIN, END = "<!-- keys: generated from the schema -->\n", "<!-- end of keys -->\n"


def table() -> str:
    """Return the Markdown: a table for each section; methods share a row where it is equal."""
    parts = []
    for section, group in groupby(keys(), key=lambda key: key.key.split(".")[0]):
        rows = _merged(list(group))
        many = section == "method"
        head = ["key", *(["of"] if many else []), "type", "default", "allowed", "what it is"]
        lines = [f"### `{section}`\n", _line(head), _line(["---"] * len(head))]
        for key, methods in rows:
            cells = [f"`{key.key}`", *([", ".join(methods)] if many else [])]
            default = f"`{key.default}`" if key.default else "required"
            cells += [key.type, default, key.allowed, key.description]
            lines.append(_line(cells))
        parts.append("\n".join(lines) + "\n")
    return "\n" + "\n".join(parts) + "\n"


def _merged(rows: list[Key]) -> list[tuple[Key, list[str]]]:
    """Put keys together that are the same for several methods."""
    merged: dict[Key, list[str]] = {}
    for row in rows:
        merged.setdefault(row._replace(method=""), []).append(row.method)
    return list(merged.items())


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def written() -> str:
    """Return the table that stands in REFERENCE.md."""
    return REFERENCE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Write the table into REFERENCE.md."""
    text = REFERENCE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    REFERENCE.write_text(head + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
