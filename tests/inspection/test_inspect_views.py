"""The terminal's map and tables: they fit, and a share stands where its site and control meet."""

import io

import pytest
from rich.console import Console

from moc_cli.report.routing import RAMP, SCALE, heat_map, routing_views, summary_rows


def routing(layers: int, blocks=("attn", "ffn"), **more) -> dict:
    """Site i chooses control (3 i) mod S in all its decisions."""
    sites = [
        {"name": f"{layer}.{block}", "layer": layer, "block": block, "pool": "shared"}
        for layer in range(layers)
        for block in blocks
    ]
    size = len(sites)
    share = [[float(c == 3 * s % size) for c in range(size)] for s in range(size)]
    names = [site["name"] for site in sites]
    numbers = {
        "local_share": 0.1,
        "gate_entropy": 2.0,
        "use_entropy": 1.5,
        "effective": 4.5,
        "margin": 0.01,
        "one_token": None,
        "relative_size": 0.25,
    }
    return {
        "level": "sample",
        "decisions": 1000,
        "sites": sites,
        "share": share,
        "per_site": [
            numbers | {"name": n, "top": names[row.index(1.0)]}
            for n, row in zip(names, share, strict=True)
        ],
        "per_control": [{"name": n, "use": 1 / size, "dead": False, "norm": 1.0} for n in names],
        "summary": {
            **{
                key: numbers[key]
                for key in ("local_share", "gate_entropy", "use_entropy", "margin")
            },
            "effective": 4.5,
            "attn_to_ffn": 0.4,
            "ffn_to_attn": None,
            "dead": names[:20],
            "chance_local": 1 / size,
        },
        "task_distance": {"tasks": ["a", "b"], "matrix": [[0.0, 0.5], [0.5, 0.0]]},
        "compare": {"run": "[red]x", "difference": share, "distance": [0.5] * size},
        "ablation": [{"site": n, "loss_change": 0.01, "stderr": None} for n in names],
        "tokens": None,
    } | more


def drawn(*parts, width: int = 100, colored: bool = False) -> str:
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=colored,
        color_system="truecolor" if colored else None,
        highlight=False,
    )
    for part in parts:
        console.print(part)
    return console.file.getvalue()


@pytest.mark.parametrize("layers", [1, 4, 32, 80])
def test_the_map_without_colours_has_a_line_a_site(layers):
    given = routing(layers)
    lines = drawn(heat_map(given, colored=False)).splitlines()
    assert max(map(len, lines)) <= 100
    names = [site["name"] for site in given["sites"]]
    rows = [line for line in lines if line.split(" ")[0] in names]
    assert [row.split(" ")[0] for row in rows] == names
    size = len(names)
    label = max(map(len, names)) + 1
    cells = {1: 4, 4: 4, 32: 1, 80: 1}[layers]
    joined = {80: 2}.get(layers, 1)
    for site, row in enumerate(rows):
        place = label + 3 * site % size // joined * cells
        drawn_at = [i for i, char in enumerate(row[label:], label) if char != " "]
        assert drawn_at == list(range(place, place + cells))
        assert row[place] == RAMP[-1]
    assert ("numbered by layer, 2 a column" in lines[1]) is (layers == 80)


def test_64_sites_and_controls_are_32_coloured_lines_in_100_columns():
    given = routing(32)
    given["share"][1] = [0.0] * 63 + [0.01]
    text = drawn(heat_map(given), colored=True)
    lines = [line for line in text.splitlines() if "▀" in line]
    assert len(lines) == 32
    plain = drawn(heat_map(given, colored=False)).splitlines()
    assert max(map(len, plain)) <= 100
    assert lines[0].split("\x1b")[0].strip() == "0.attn ffn"

    def code(level: int, ground: int) -> str:
        return "{};2;{};{};{}".format(ground, *SCALE[level])

    # The first cell: 0.attn above chooses 0.attn always, 0.ffn below never. The last one: never,
    # and once in a hundred, which is seen.
    cells = lines[0].split("▀")
    assert code(8, 38) in cells[0]
    assert code(0, 48) in cells[0]
    assert code(0, 38) in cells[-2]
    assert code(1, 48) in cells[-2]


def test_layers_are_numbered_over_their_columns():
    lines = drawn(heat_map(routing(32), colored=False)).splitlines()
    axis = next(line for line in lines if line.strip().startswith("0 "))
    label = len("31.attn") + 1
    for layer in (0, 9, 10):
        place = label + 2 * layer
        assert axis[place:].split(" ")[0] == str(layer)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_every_table_fits_and_says_what_it_leaves_out(width):
    text = drawn(*routing_views(routing(32), width=width, colored=False), width=width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert "16 of 64 sites" in text
    assert "16 of 64 controls" in text
    assert "and 8 more" in text
    assert "Against [red]x" in text


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_heading_is_cut(width):
    """Tables wider than the terminal go on below, each part with the first column."""
    tasks = ["ARC-Challenge", "social_i_qa", "OpenBookQA", "HellaSwag", "winogrande", "boolq"]
    section = {"tasks": tasks, "matrix": [[0.25] * 6] * 6}
    given = routing(4, task_distance=section)
    text = drawn(*routing_views(given, width=width, colored=False), width=width)
    assert max(map(len, text.splitlines())) <= width
    distances = text[text.index("Distance of") : text.index("Against")]
    for task in tasks:
        assert sum(task in line.split() for line in distances.splitlines()) > 1
    heads = ["share %", "effective", "one token %", "size %", "norm of B A", "change, nats"]
    for head in [*heads, "by chance", "most by site", "less here", "± stderr"]:
        assert head in text


def test_tables_of_a_text_cap_tokens_and_sites():
    given = routing(32)
    size = len(given["sites"])
    tokens = {
        "tokens": [f" w{n}" for n in range(70)],
        "votes": [[(s + n) % size for n in range(70)] for s in range(size)],
        "probability": [[0.5] * 70] * size,
        "choice": [[s] for s in range(size)],
        "margin": [0.125] * size,
    }
    given["tokens"] = tokens
    text = drawn(*routing_views(given, colored=False))
    assert "of 64 sites fit; --site 31.ffn shows another" in text
    assert "60 of 70 tokens" in text
    assert "·w59" in text
    assert "·w60" not in text
    assert "Which control" not in text
    text = drawn(*routing_views(given, colored=False, site="1.ffn"))
    assert "Votes at 1.ffn: chosen 1.ffn, by a lead of 0.1250" in text
    row = next(line for line in text.splitlines() if "·w0 " in line)
    assert row.split() == ["·w0", "1.ffn", "0.5000", "✓"]
    assert "60 of 70 tokens" in text


def test_chance_knows_that_a_site_may_not_take_its_own_control():
    """With exclude_local the pool of a decision has one control less."""
    given = routing(4)
    _, rows = summary_rows(given)
    assert [row[2] for row in rows[1:6]] == ["50.0 %", "50.0 %", "2.079", "0", "2.079"]
    given["summary"]["chance_local"] = 0.0
    _, rows = summary_rows(given)
    assert [row[2] for row in rows[:6]] == ["0.0 %", "57.1 %", "57.1 %", "1.946", "0", "2.079"]
