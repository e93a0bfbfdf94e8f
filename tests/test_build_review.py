"""Verdicts, their agreement, Label Studio's files, and the accepted set."""

import json
import shutil

import build_case
import pytest
from llm_server import Model

from mmrstraj_jax import build, jsonl
from mmrstraj_jax.construction import label_studio, review
from mmrstraj_jax.data import records
from mmrstraj_jax.errors import UserError

pytest.importorskip("openai")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("world"), Model()
    build_case.write_world(root, trips=8)
    config, out = build_case.config(root, model.url), root / "city"
    try:
        build.main(["all", "--out", str(out), "--config", str(config)])
    finally:
        model.close()
    return out


@pytest.fixture
def city(built, tmp_path):
    for name in ("rsi-traffic", "rsi-instruct"):
        shutil.copytree(built / name, tmp_path / "city" / name)
    return tmp_path / "city"


def run(city, *words):
    return build.main(["review", "--out", str(city), *map(str, words)])


def verdict(reviewer, verdict, edit=""):
    return {"reviewer": reviewer, "verdict": verdict, "edit": edit}


@pytest.mark.parametrize(
    ("given", "reviewers", "state", "edit"),
    [
        ([], 1, "unreviewed", ""),
        ([verdict("a", "supported")], 2, "unreviewed", ""),
        ([verdict("a", "plausible inference")], 1, "accepted", ""),
        ([verdict("a", "unsupported")], 1, "dropped", ""),
        ([verdict("a", "wrong", "A better one.")], 1, "accepted", "A better one."),
        ([verdict("a", "supported"), verdict("b", "wrong")], 2, "disputed", ""),
        ([verdict("a", "supported"), verdict("b", "wrong"), verdict("c", "wrong")], 2, "dropped", ""),
        ([verdict("a", "supported"), verdict("b", "supported"), verdict("c", "wrong")], 2, "accepted", ""),
        ([verdict("a", "supported", "x"), verdict("b", "supported", "y")], 2, "disputed", ""),
        ([verdict("a", "supported", "x"), verdict("b", "wrong", "x")], 2, "accepted", "x"),
    ],
)
def test_decisions(given, reviewers, state, edit):
    assert review.decide(given, reviewers) == (state, edit)


def test_cohens_kappa_of_known_tables():
    # Cohen's textbook case: 20 both yes, 5 and 10 apart, 15 both no: 0.7 observed, 0.4 beyond chance
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert review.kappa(pairs) == (0.7, pytest.approx(0.4))
    assert review.kappa([("a", "a"), ("b", "b")]) == (1.0, 1.0)
    assert review.kappa([("a", "b"), ("b", "a")]) == (0.0, pytest.approx(-1.0))
    assert review.kappa([("a", "a")] * 3) == (1.0, None)


def annotated(tasks, reviewer, choose):
    """The tasks as Label Studio exports them: its own ids, times, and who said what."""
    exported = []
    for number, task in enumerate(tasks):
        said, edit = choose(number)
        result = [{"id": "r1", "from_name": "verdict", "to_name": "answer", "type": "choices",
                   "value": {"choices": [said]}}]  # fmt: skip
        if edit:
            result.append(
                {"from_name": "edit", "to_name": "answer", "type": "textarea", "value": {"text": [edit]}}
            )
        annotation = {"id": number, "completed_by": reviewer, "was_cancelled": False, "result": result,
                      "created_at": "2026-01-01T00:00:00Z", "lead_time": 3.2}  # fmt: skip
        exported.append(
            {"id": number + 7, "data": task["data"], "annotations": [annotation], "predictions": []}
        )
    return exported


def test_from_tasks_to_the_accepted_set(city, tmp_path, capsys):
    before = build_case.files(city / "rsi-traffic")
    run(city, "--tasks", tmp_path / "tasks.json")
    tasks = json.loads((tmp_path / "tasks.json").read_bytes())
    xml = (tmp_path / "tasks.xml").read_text()
    assert all(f'value="{name}"' in xml for name in review.VERDICTS) and "$answer" in xml
    made = [json.loads(line) for line in (city / "rsi-traffic" / "provenance.jsonl").open()]
    assert len(tasks) == sum(len(row["turns"]) for row in made)
    assert tasks[0]["data"]["image"].startswith("/data/local-files/?d=images/")

    def ann(number):
        return ("wrong", "Ann's better answer.") if number == 0 else ("supported", "")

    def bo(number):
        first = tasks[number]["data"]["item"].endswith("#0")
        return ("wrong" if number == 0 else "supported" if first else "unsupported"), ""

    ann_said = json.dumps(annotated(tasks, {"id": 3, "email": "ann@lab"}, ann))
    (tmp_path / "ann.json").write_text(f"\ufeff{ann_said}")  # saved again by an editor
    (tmp_path / "bo.json").write_text(json.dumps(annotated(tasks, 12, bo)))
    run(city, "--verdicts", tmp_path / "ann.json", "--accepted", "one")
    run(city, "--verdicts", tmp_path / "bo.json", "--reviewers", "2", "--accepted", "two")
    assert "ann@lab" in (shown := capsys.readouterr().out) and "Cohen's kappa" in shown
    # taking in the same file again adds nothing
    log = (city / "review" / "rsi-traffic" / "verdicts.jsonl").read_bytes()
    run(city, "--verdicts", tmp_path / "bo.json")
    assert (city / "review" / "rsi-traffic" / "verdicts.jsonl").read_bytes() == log

    one = [row for path in (city / "one").glob("rsi*.json") for row in json.loads(path.read_bytes())]
    assert len(one) == len(made)
    edited = [row for row in one if row["id"] == tasks[0]["data"]["item"].split("#")[0]]
    assert edited[0]["conversations"][1]["value"] == "Ann's better answer."
    counts = json.loads((city / "two" / "manifest.json").read_bytes())["counts"]
    two = [row for path in (city / "two").glob("rsi*.json") for row in json.loads(path.read_bytes())]
    # of the first image the two disagree; the others keep their first turns only
    assert len(two) == len(made) - 1 == counts["rows"] and all(len(r["conversations"]) == 2 for r in two)
    assert counts["agreement"][0]["items"] == len(tasks) and counts["turns"]["disputed"] >= 1
    provenance = [json.loads(line) for line in (city / "two" / "provenance.jsonl").open()]
    assert provenance[0]["turns"][0]["reviewed_by"] == ["12", "ann@lab"]
    assert provenance[0]["turns"][0]["by"] == "model:m"
    records.load(str(city / "two" / "rsi_traffic.json"), on_bad="error")
    assert build_case.files(city / "rsi-traffic") == before

    # what Label Studio is given again holds what is known, and comes back the same
    run(city, "--tasks", tmp_path / "again.json")
    back = list(label_studio.read(tmp_path / "again.json"))
    assert {(r["item"], r["reviewer"], r["verdict"], r["edit"]) for r in back} == {
        (r["item"], r["reviewer"], r["verdict"], r["edit"])
        for r in jsonl.read(city / "review" / "rsi-traffic" / "verdicts.jsonl")
    }


def test_a_split_of_which_nothing_is_left_has_no_file(city, tmp_path):
    """An empty list would be refused by training and by the TFDS builder."""
    run(city, "--tasks", tmp_path / "tasks.json")
    tasks = json.loads((tmp_path / "tasks.json").read_bytes())
    files = sorted(path.name for path in (city / "rsi-traffic").glob("rsi_*.json"))
    kept = {row["id"] for row in json.loads((city / "rsi-traffic" / files[0]).read_bytes())}
    assert files == ["rsi_traffic.json", "rsi_traffic_test.json"]

    def said(number):
        return ("supported" if tasks[number]["data"]["item"].split("#")[0] in kept else "wrong"), ""

    (tmp_path / "v.json").write_text(json.dumps(annotated(tasks, 1, said)))
    run(city, "--verdicts", tmp_path / "v.json", "--accepted", "kept")
    assert [path.name for path in (city / "kept").glob("rsi_*.json")] == ["rsi_traffic.json"]


def test_captions_of_people_need_no_review(city, tmp_path):
    run(city, "--dataset", "rsi-instruct", "--tasks", tmp_path / "t.json")
    tasks = json.loads((tmp_path / "t.json").read_bytes())
    assert tasks and all(task["data"]["item"].endswith("#1") for task in tasks)
    (tmp_path / "v.json").write_text(json.dumps(annotated(tasks, 1, lambda n: ("wrong", ""))))
    run(city, "--dataset", "rsi-instruct", "--verdicts", tmp_path / "v.json", "--accepted", "kept")
    rows = json.loads((city / "kept" / "rsi_instruct.json").read_bytes())
    assert len(rows) == 8 and all(len(row["conversations"]) == 2 for row in rows)


def test_mistakes_are_named(city, tmp_path):
    run(city, "--tasks", tmp_path / "tasks.json")
    tasks = json.loads((tmp_path / "tasks.json").read_bytes())
    good = annotated(tasks[:1], 1, lambda n: ("supported", ""))

    def refused(change, message):
        bad = json.loads(json.dumps(good))
        change(bad)
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        with pytest.raises(UserError, match=message):
            run(city, "--verdicts", tmp_path / "bad.json")
        assert not (city / "review" / "rsi-traffic" / "verdicts.jsonl").exists()

    result = lambda bad: bad[0]["annotations"][0]["result"]  # noqa: E731
    refused(lambda bad: bad[0].pop("annotations"), "task 0: expected data and annotations")
    refused(lambda bad: result(bad)[0]["value"].update(choices=["great"]), "one verdict of supported")
    refused(lambda bad: bad[0]["data"].update(item="x#0"), "'x#0' is not in this data set")
    refused(lambda bad: bad[0]["data"].update(text="other"), "its text changed")
    refused(lambda bad: bad[0]["annotations"][0].pop("completed_by"), "a reviewer")
    with pytest.raises(UserError, match="no verdicts yet"):
        run(city, "--accepted", "x")
    with pytest.raises(UserError, match="rsi-traffic or rsi-instruct"):
        run(city, "--dataset", "ucm")
    run(city, "--accepted", "all", "--keep-unreviewed")
    assert len(list((city / "all" / "images").glob("*.png"))) >= 6


def test_the_last_verdict_of_a_file_counts_without_its_line_break(city, tmp_path):
    run(city, "--tasks", tmp_path / "tasks.json")
    tasks = [task["data"] for task in json.loads((tmp_path / "tasks.json").read_bytes())][:2]
    rows = [{"item": t["item"], "text": t["text"], **verdict("ann", "supported")} for t in tasks]
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(city, "--verdicts", tmp_path / "v.jsonl")
    assert jsonl.read(city / "review" / "rsi-traffic" / "verdicts.jsonl") == rows


def test_the_same_export_again_changes_no_verdict(city, tmp_path):
    """A reviewer who judged an answer twice has two annotations in every export."""
    run(city, "--tasks", tmp_path / "tasks.json")
    task = json.loads((tmp_path / "tasks.json").read_bytes())[0]["data"]
    rows = [{k: task[k] for k in ("item", "text")} | verdict("ann", said) for said in ("wrong", "supported")]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(3):
        run(city, "--verdicts", tmp_path / "v.jsonl")
        assert jsonl.read(city / "review" / "rsi-traffic" / "verdicts.jsonl") == rows[1:]


def test_tasks_may_lie_beside_the_images_they_show(city, tmp_path):
    run(city, "--tasks", city / "rsi-traffic" / "tasks.json")
    tasks = json.loads((city / "rsi-traffic" / "tasks.json").read_bytes())
    (tmp_path / "v.json").write_text(json.dumps(annotated(tasks, 1, lambda n: ("supported", ""))))
    run(city, "--verdicts", tmp_path / "v.json", "--accepted", "kept")
    assert not (city / "kept" / "tasks.json").exists() and (city / "kept" / "rsi_traffic.json").is_file()
    (tmp_path / "v.json").write_text(json.dumps(annotated(tasks, 2, lambda n: ("wrong", ""))))
    with pytest.raises(UserError, match="input verdicts: changed.* name another --accepted"):
        run(city, "--verdicts", tmp_path / "v.json", "--accepted", "kept")


def test_a_set_of_an_older_build_with_an_id_twice_is_named(city, tmp_path):
    path = city / "rsi-instruct" / "rsi_instruct.json"
    rows = json.loads(path.read_bytes())
    path.write_text(json.dumps([*rows, rows[0]]))
    with pytest.raises(UserError, match="2 rows have the id '0'"):
        run(city, "--dataset", "rsi-instruct", "--tasks", tmp_path / "t.json")
