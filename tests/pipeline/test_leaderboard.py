"""The leaderboards and their tests, by hand and against scipy; the figures; the sorting of the page."""

import itertools
import re
import shutil
import subprocess

import numpy as np
import pytest
from scipy import stats

from heba.data.datasets import BENCHMARKS
from heba.data.protocols import PROTOCOLS
from pipeline.report import figures, leaderboard, render, statistics, tables
from tests.pipeline.records import record

NAMES = ["zero_shot", "gda", "heba"]


def made(n, seeds=(1, 2), protocol="base_to_novel"):
    """On n data sets HeBA is 10 above CLIP, and GDA above HeBA on the first one and level on the last."""
    found = []
    for i, dataset in enumerate(PROTOCOLS[protocol].complete[:n]):
        level = 40.0 + i
        gda = level + 10 + (1 if i == 0 else 0 if i == n - 1 else -0.1 * i * (-1) ** i)
        for seed in seeds:
            for name, value in zip(NAMES, (level, gda, level + 10), strict=True):
                values = (value,) * len(PROTOCOLS[protocol].groups)
                found.append(record(name, dataset, seed, values, protocol))
    return found


def board_of(records, protocol="base_to_novel", names=NAMES, **more):
    data = tables.long_table(records)
    table = tables.tidy_table(data, protocol, names)
    return leaderboard.leaderboard(data, table, protocol, names, names[-1], **more)


def test_a_signed_rank_test_is_that_of_scipy():
    rng = np.random.default_rng(0)
    for n in (6, 11, 15):
        differences = rng.normal(0.5, size=n)
        assert statistics.wilcoxon(differences) == pytest.approx(
            stats.wilcoxon(differences, method="exact").pvalue
        )


def test_a_signed_rank_test_counts_all_signs_with_ties_and_zeros():
    differences = [1, 1, 2, -2, 3, 4, 0]
    ranks = [1.5, 1.5, 3.5, 3.5, 5, 6]
    sums = [
        sum(s * r for s, r in zip(signs, ranks, strict=True)) for signs in itertools.product((-1, 1), repeat=6)
    ]
    own = 1.5 + 1.5 + 3.5 - 3.5 + 5 + 6
    assert statistics.wilcoxon(differences) == pytest.approx(np.mean([abs(s) >= own for s in sums]))
    assert statistics.wilcoxon([1] * 6) == statistics.least_p(6) == 2 / 64
    assert statistics.wilcoxon([0, 0]) == statistics.wilcoxon([]) == 1
    assert statistics.least_p(statistics.FEWEST) < statistics.ALPHA < statistics.least_p(statistics.FEWEST - 1)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.5]) == [1, 1]
    assert statistics.holm([]) == []


def test_the_interval_of_a_mean():
    values = np.random.default_rng(1).normal(2, 1, size=11)
    low, high = statistics.bootstrap(values)
    assert (low, high) == statistics.bootstrap(values)
    assert low < values.mean() < high
    # Near the normal interval, whose standard error divides by n as well.
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 11**0.5, rel=0.05)
    assert statistics.bootstrap([3.0] * 6) == (3, 3)


def test_friedman_and_the_critical_difference():
    scores = np.random.default_rng(2).normal(size=(14, 4)) + np.arange(4)
    found = statistics.friedman(scores)
    assert (found.statistic, found.p) == pytest.approx(tuple(stats.friedmanchisquare(*scores.T)))
    assert found.critical == pytest.approx(1.25, abs=0.005)  # Demsar 2006, section 3.2.4
    assert statistics.friedman(np.ones((6, 3)))[:2] == (0, 1)
    assert statistics.alike([1, 2, 3, 4], 1.5) == [(0, 1), (1, 2), (2, 3)]
    assert statistics.alike([1, 1.1, 1.2, 5], 1) == [(0, 2)]
    assert statistics.alike([1, 2], 1) == []


def test_a_leaderboard_by_hand():
    board = board_of(made(8))
    table = board.column(16, "h")
    assert list(board.ranking().index) == ["gda", "heba", "zero_shot"]
    assert table.loc["heba", "accuracy"] == pytest.approx(53.5)
    # GDA is the first on sets 0, 1, 3, 5 and shares the first place on the last.
    assert list(table.loc["gda", ["wins", "ties", "losses"]]) == [4, 1, 3]
    assert list(table.loc["zero_shot", ["wins", "ties", "losses"]]) == [0, 0, 8]
    assert table["rank"].to_dict() == {"zero_shot": 3, "gda": (4 + 1.5 + 3 * 2) / 8, "heba": (3 + 1.5 + 4 * 2) / 8}
    assert table.loc["zero_shot", "difference"] == pytest.approx(-10)
    assert list(table.loc["zero_shot", ["low", "high"]]) == pytest.approx([-10, -10])
    assert table.loc["zero_shot", "p"] == 2 / 256
    assert table.loc["zero_shot", "p_holm"] == 4 / 256
    assert table.isna().loc["heba", "difference"]
    # The noise between GDA and HeBA makes both bold, and the difference to CLIP does not.
    assert board.bold()[16, "h"] == {"gda", "heba"}
    first, against = leaderboard.blocks(board, NAMES)
    assert list(first.cells.columns) == ["Method", "Family", "Base", "Novel", "H", "Rank", "W/T/L"]
    assert list(first.cells["W/T/L"]) == ["4/1/3", "", "0/0/8"]
    assert list(first.ranks["H"]) == [1, 1, 0]
    assert list(against.cells["Method"]) == ["GDA", "CLIP"]
    assert list(against.cells["95 % interval"])[1] == "-10.00 to -10.00"
    assert any("critical difference of ranks: 1.17" in note for note in leaderboard.notes(board))


def test_too_few_data_sets_for_a_test():
    board = board_of(made(5))
    assert board.friedman is None
    assert board.rows[["p", "p_holm", "low", "high"]].isna().all().all()
    assert not board.rows["bold"].any()
    assert any("Too few data sets" in note for note in leaderboard.notes(board))
    # Six are enough for one comparison, and not for two.
    assert any("cannot fall below 0.06" in note for note in leaderboard.notes(board_of(made(6))))
    assert not any("cannot fall" in note for note in leaderboard.notes(board_of(made(7))))
    two = [r for r in made(6) if r.method != "gda"]
    assert board_of(two, names=["zero_shot", "heba"]).bold()[16, "h"] == {"heba"}


def test_seeds_are_named_where_they_are_few():
    notes = [" ".join(leaderboard.notes(board_of(made(8, seeds)))) for seeds in ((1,), (1, 2), (1, 2, 3))]
    assert ["One seed" in text for text in notes] == [True, False, False]
    assert ["Two seeds" in text for text in notes] == [False, True, False]


def test_a_pair_has_the_seeds_that_both_have():
    records = [r for r in made(6) if (r.method, r.seed) != ("zero_shot", 2)]
    raised = [
        record("heba", r.dataset, 2, (99.0, 99.0)) if (r.method, r.seed) == ("heba", 2) else r for r in records
    ]
    assert board_of(raised).column(16, "h").loc["zero_shot", "difference"] == pytest.approx(-10)


def test_methods_without_a_common_seed_are_not_compared():
    records = [r for r in made(6) if (r.seed == 2) == (r.method == "gda")]
    board = board_of(records)
    assert board.column(16, "h")["rank"].notna().all()
    assert list(leaderboard.blocks(board, NAMES)[1].cells["Method"]) == ["CLIP"]
    alone = [r for r in records if r.method != "zero_shot"]
    assert len(leaderboard.blocks(board_of(alone, names=["gda", "heba"]), ["gda", "heba"])) == 1


def test_a_method_that_lacks_a_data_set_has_no_rank():
    records = [r for r in made(8) if (r.method, r.dataset) != ("gda", "sun397")]
    board = board_of(records)
    assert list(board.scores) == ["zero_shot", "heba"]
    cells = leaderboard.blocks(board, NAMES)[0].cells.set_index("Method")
    assert list(cells.loc["GDA", ["H", "Rank", "W/T/L"]]) == ["", "", ""]


def test_the_reference_may_be_any_method_and_parameters_are_those_of_the_records(tmp_path):
    counts = {("gda", d): 100 + i for i, d in enumerate(BENCHMARKS[:8])}
    records = [r.model_copy(update={"trained_parameters": counts.get((r.method, r.dataset), 0)}) for r in made(8)]
    render.render_report(records, NAMES, tmp_path, False, reference="gda")
    table = tables.pd.read_csv(tmp_path / "leaderboard.csv").set_index(["group", "method"])
    assert set(table["reference"].dropna()) == {"gda"}
    assert table.loc[("h", "heba"), "wins"] == 3
    assert table.loc[("h", "gda"), "parameters"] == 103.5
    assert table.loc[("h", "heba"), "parameters"] == 0
    text = (tmp_path / "leaderboard.md").read_text()
    assert "Against GDA" in text
    assert "| Trained |" in text
    assert (tmp_path / "figures" / "base_to_novel_parameters.svg").is_file()


def test_names_beside_a_figure_stand_apart():
    assert figures.apart([0.1, 0.5], 0.1) == pytest.approx([0.1, 0.5])
    assert figures.apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    places = figures.apart([0.1, 0.12, 0.3, 0.31, 0.32, 0.9], 0.05)
    assert min(np.diff(places)) > 0.0499


def test_the_figures_name_every_method_that_they_show(tmp_path):
    records = [*made(8), *(r for k in (1, 4) for r in few_shot(k))]
    render.render_report(records, NAMES, tmp_path, published=False)
    found = {path.stem: path.read_text() for path in (tmp_path / "figures").iterdir()}
    assert set(found) == {
        *("base_to_novel_scatter", "base_to_novel_differences", "base_to_novel_ranks"),
        *("few_shot_average", "few_shot_datasets", "few_shot_differences", "few_shot_ranks"),
        *("base_to_novel_parameters", "few_shot_parameters"),
    }
    for name, text in found.items():
        assert all(title in text for title in ("GDA", "HeBA", "CLIP")), name
        assert text in (tmp_path / "index.html").read_text()
        assert f"figures/{name}.svg" in (tmp_path / "README.md").read_text()


def few_shot(shots):
    return [r.model_copy(update={"shots": shots}) for r in made(6, protocol="few_shot")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium (Debian: chromium)")
def test_a_click_on_a_heading_sorts(tmp_path):
    """Numbers from the highest on, what has none last; a second click turns the order round."""
    records = [r for r in made(8) if (r.method, r.dataset) != ("gda", "sun397")]
    render.render_report(records, NAMES, tmp_path, published=False)
    page = (tmp_path / "index.html").read_text()
    for clicks, order in ((0, "HeBA CLIP GDA"), (1, "CLIP HeBA GDA"), (2, "HeBA CLIP GDA")):
        head = "document.querySelectorAll('table.sortable')[1].rows[0].cells[5]"
        script = f"<script>for (let i = 0; i < {clicks}; i++) {head}.click();</script>"
        (tmp_path / "clicked.html").write_text(page.replace("</html>", f"{script}</html>"))
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "clicked.html"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
        table = re.findall(r"<table.*?</table>", done.stdout, re.DOTALL)[1]
        assert re.findall(r"<tr><td>(\w+)", table) == order.split()
