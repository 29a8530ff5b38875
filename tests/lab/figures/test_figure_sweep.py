"""Heat maps and page of a sweep: medians and counts over the right seeds, dashes, labels, and what failed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from test_report import Page

from mixturelens import figures
from mixturelens.lab.figures.sweep import Axis, NumberMap, Spread, WordMap, heat_maps
from mixturelens.lab.pages.sweep import Swept, answer, columns, write_sweep

AXES = {"recipe": ("tiny",), "rate": (0.1, 0.2), "mixture": ("even", "<rare>"), "steps": (None, 5)}
SEEDS = (0, 1, 2)


def make_table() -> pd.DataFrame:
    """Seed 2 of the last setting is missing, and its share was never measured."""
    rows = []
    for steps in ("null", "5"):
        for j, mixture in enumerate(AXES["mixture"]):
            for i, rate in enumerate(AXES["rate"]):
                for seed in SEEDS:
                    last = (steps, mixture, rate) == ("5", "<rare>", 0.2)
                    if last and seed == 2:
                        continue
                    share = 0.1 * i + 0.2 * j + 0.01 * seed + (0.5 if steps == "5" else 0.0)
                    rows.append(
                        {
                            "cell": f"tiny--rate={rate}--mixture={mixture}--steps={steps}--seed={seed}",
                            "recipe": "tiny",
                            "rate": rate,
                            "mixture": mixture,
                            "steps": steps,
                            "seed": seed,
                            "after": "rl-A",
                            "trained_cue": "A",
                            "accuracy.A.after": 0.9,
                            "accuracy.A.after.low": 0.8,
                            "accuracy.A.after.high": 0.95,
                            "routing_share": np.nan if last else share,
                            "routing_share.low": np.nan if last else share - 0.1,
                            "routing_share.high": np.nan if last else share + 0.1,
                            "verdict": "routing" if seed else "both",
                        }
                    )
    table = pd.DataFrame(rows)
    return table.astype(dict.fromkeys(("cell", "recipe", "mixture", "steps", "after", "verdict"), "string"))


def test_a_cell_holds_median_spread_and_missing_seeds():
    cells = [[Spread(0.5, 0.4, 0.6, 3, 3), Spread(0.25, 0.25, 0.25, 1, 3)], [Spread(None, None, None, 0, 3)] * 2]
    figure = heat_maps([NumberMap("share", cells, 0.0, 1.0)], Axis("rate", ["1", "2"]), Axis("<up>", ["a", "b"]))
    [drawn] = figure.data
    assert [*map(list, drawn.z)] == [[0.5, 0.25], [None, None]]
    assert (drawn.zmin, drawn.zmax) == (0.0, 1.0)
    small = "<span style='font-size:10.5px'>{}</span>".format
    assert [*drawn.text[0]] == [f"0.500<br>{small('0.400 to 0.600')}", f"0.250<br>{small('1 of 3 seeds')}"]
    assert [*drawn.text[1]] == [figures.DASH, figures.DASH]
    assert figure.layout.xaxis.ticktext == ("1", "2")
    assert figure.layout.yaxis.title.text == "&lt;up&gt;"


def test_a_word_is_tinted_where_more_than_half_say_it():
    cells = [[{"routing": 2, "both": 1}, {"both": 1, "routing": 1}, {"new word": 3}, {}]]
    figure = heat_maps([WordMap("verdict", cells)], Axis("rate", list("1234")), Axis("", [""]))
    [drawn] = figure.data
    # routing, both, new word; past them white
    assert [*map(list, drawn.z)] == [[0, 3, 2, None]]
    colours = dict(zip(("first", "last"), (drawn.colorscale[0][1], drawn.colorscale[-1][1]), strict=True))
    assert colours == {"first": "#C9D3E0", "last": "#FFFFFF"}
    assert drawn.text[0][0] == "routing 2<br>both 1"
    assert drawn.text[0][3] == figures.DASH


@pytest.mark.parametrize(("values", "rows"), [(2, 1), (5, 3), (40, 6)])
def test_panels_go_below_each_other_where_there_is_no_room(values, rows):
    maps = [NumberMap(str(i), [[Spread(0.1, 0.1, 0.1, 1, 1)] * values], 0.0, 1.0) for i in range(6)]
    maps = maps[: 4 if values == 2 else 6]
    figure = heat_maps(maps, Axis("rate", [str(i) for i in range(values)]), Axis("", [""]))
    assert len(figure._grid_ref) == rows
    assert figure.data[0].text[0][0] == (".1" if values == 40 else "0.100")
    assert figure.data[0].hovertext[0][1] == "rate 1<br>0.100"


def test_the_page_says_what_the_table_says(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "plotly_script", lambda: "")  # megabytes that are not ours
    failed = {"tiny--rate=0.2--mixture=<rare>--steps=5--seed=2": "RuntimeError: out of <memory>"}
    path = write_sweep(
        tmp_path / "sweep.html",
        "Sweep: rates",
        Swept(make_table(), AXES, SEEDS, 24, failed),
        "seeds: 3\n",
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not [link for link in page.links if not link.startswith(("data:", "#"))]
    assert "RuntimeError: out of <memory>" in page.text
    assert "seeds: 3" in page.text
    # a figure for each value of the third key
    assert text.count('id="figure-') == 2
    assert "steps null. Median" in text
    assert "steps 5. Median" in text
    assert "0.610" in text
    again = path.read_bytes()
    write_sweep(
        path,
        "Sweep: rates",
        Swept(make_table(), AXES, SEEDS, 24, failed),
        "seeds: 3\n",
    )
    assert path.read_bytes() == again


def test_the_answer_counts_cells_and_verdicts():
    first, *lines = answer(Swept(make_table(), AXES, SEEDS, 24, {"x": "y"}))
    assert first == "23 of 24 cells are done: 2 x rate, 2 x mixture, 2 x steps, 3 seeds."
    [line] = lines
    assert line.startswith("rl-A, trained on A, 23 cells")
    assert "accuracy under A 0.900 (0.900 to 0.900)" in line
    assert line.endswith("verdict: routing 15, both 8.")


def test_an_empty_table_has_nothing_to_draw():
    empty = pd.DataFrame(columns=["cell", "recipe", "seed", "after", "trained_cue"])
    assert columns(empty) == {}
    assert answer(Swept(empty, {"recipe": ("tiny",)}, (0,), 1, {"x": "y"})) == ["0 of 1 cells are done: 1 seed."]
