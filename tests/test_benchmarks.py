"""The benchmark of prompt learners, on a narrow CLIP: all ways of a method give the same numbers."""

import pytest

from benchmarks import prompt_plain, prompt_step
from heba import methods


def run(*names):
    prompt_step.main(method=list(names), images=4, classes=3, rounds=1, tiny=True)


@pytest.mark.parametrize("name", prompt_plain.LOSSES)
def test_a_step_of_a_prompt_learner(name, capsys):
    run(name)
    reads = methods.part(name, "settings").READS
    ways = ["plain", "ours"] + ["ours, on views"] * (reads == "features")
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[4:]]
    assert rows == [f"{name}, {what}" for what in ways]


def test_a_way_that_gives_other_numbers_is_not_timed(monkeypatch, capsys):
    def twice(*args):
        loss = prompt_plain.coop(*args)
        return lambda images, labels: 2 * loss(images, labels)

    monkeypatch.setitem(prompt_plain.LOSSES, "coop", twice)
    with pytest.raises(SystemExit, match=r"coop, ours: loss: the ways differ by 5\.0e-01"):
        run("coop")
    assert not capsys.readouterr().out
