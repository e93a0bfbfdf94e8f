"""SynthTraffic-Bench: drawn as published, balanced, disjoint from training, and decided by the rules."""

import json
from collections import Counter

import numpy as np
import pytest

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import readers, score, tasks
from mmrstraj_jax.synthcity import bench, traffic
from mmrstraj_jax.synthcity.questions import GENERAL
from mmrstraj_jax.synthcity.sample import SPLITS, city_seed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench")
    bench.write(path)  # checks every hash
    return path


def test_it_is_as_published(folder):
    rows = json.loads((folder / "annotations.json").read_text())["annotations"]
    assert bench.counts(rows) == bench.published()["questions"]
    assert len(rows) >= 300 and sum(bench.counts(rows).values()) >= 2000
    general = {make.__name__ for make in GENERAL}
    assert set(bench.counts(rows)) == general | set(traffic.TYPES)
    assert min(bench.counts(rows).values()) >= 50
    with pytest.raises(UserError, match="entries"):
        bench.check({name: ["0" * 16, d[1]] for name, d in bench.published()["digests"].items()})


def test_the_cached_folder_is_as_open_as_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "write", lambda folder: (folder / "annotations.json").write_text("{}"))
    path = bench.ensure_bench(tmp_path / "cache")
    assert path.parent.stat().st_mode == tmp_path.joinpath("cache").stat().st_mode
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [path.parent.name]


def test_help_says_which_task_reads_what_it_writes(folder, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "in RSIEval's schema plus eight types; read by --task synthtraffic-bench" in shown
    assert len(bench.published()["questions"].keys() - set(readers.RSIEVAL_TYPES)) == 8
    assert len(tasks.TASKS["synthtraffic-bench"].load(folder, None)) == 2761
    with pytest.raises(UserError, match="expected one of"):
        tasks.TASKS["rsieval-vqa"].load(folder, None)


def test_no_city_is_trained_on():
    """A split's number is the highest part of every city's seed."""
    ours = {city_seed("bench", seed, k) for seed in (0, 1) for k in range(20)}
    for split in set(SPLITS) - {"bench"}:
        for seed in range(4):
            assert ours.isdisjoint(city_seed(split, seed, k) for k in range(2000))


def test_yes_and_no_are_even_for_every_question(folder):
    rows = json.loads((folder / "annotations.json").read_text())["annotations"]
    count: dict = {}
    for row in rows:
        for pair in row["qa_pairs"]:
            if pair["answer"] in ("yes", "no"):
                count.setdefault((pair["type"], pair["question"]), Counter())[pair["answer"]] += 1
    assert len(count) > 20
    assert all(c["yes"] == c["no"] for c in count.values())


def test_the_rules_decide_every_reference_and_refuse_every_other_answer(folder):
    task = tasks.get("synthtraffic-bench")
    items = task.load(folder, None)
    assert len({item.id for item in items}) == len(items) == sum(bench.published()["questions"].values())
    assert all(item.images[0].is_file() for item in items)
    oracle, _ = score.score(task, items, {item.id: item.references[0] for item in items})
    assert oracle["questions"]["micro"]["correct"] == len(items)
    # Somebody else's answer to the same question, where it differs, is wrong
    draw = np.random.default_rng(0)
    answers: dict = {}
    for item in items:
        answers.setdefault(item.question, set()).add(item.references[0])
    other = {}
    for item in items:
        choices = sorted(answers[item.question] - set(item.references))
        other[item.id] = str(draw.choice(choices)) if choices else ""
    _, rows = score.score(task, items, other)
    verdict = {row["id"]: row["verdict"] for row in rows}
    wrong = [verdict[i] for i, text in other.items() if text]
    assert len(wrong) > 1000 and wrong.count("correct") == 0 and wrong.count("wrong") > 0.99 * len(wrong)
