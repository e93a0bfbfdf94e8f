"""The build command killed at random moments, against servers that fail, and started twice."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import build_case
from llm_server import Model, text_of

from mmrstraj_jax import build
from mmrstraj_jax.errors import UserError

pytest.importorskip("openai")
pytestmark = pytest.mark.faults
KILLS = 20
CONCURRENCY = 4
PRICE = (100 * 1.0 + 20 * 10.0) / 1e6  # of the server's replies


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    build_case.write_world(root, trips=30)
    return root


@pytest.fixture
def model(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    model = Model()
    yield model
    model.close()


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """(files of a build that nothing disturbed, seconds it took)."""
    model, out = Model(), tmp_path_factory.mktemp("straight") / "city"
    try:
        words = ["all", "--out", str(out), "--config", str(build_case.config(world, model.url))]
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "mmrstraj_jax.build", *words], check=True, capture_output=True)
        return build_case.files(out), time.monotonic() - start
    finally:
        model.close()


def words(world, model, out, **options):
    words = ["all", "--out", str(out), "--config", str(build_case.config(world, model.url))]
    options = {"concurrency": CONCURRENCY} | options
    for step in ("rsi-instruct", "rsi-traffic"):
        for name, value in options.items():
            words += [f"--{step}.{name}", str(value)]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("idempotent", [True, False])
def test_twenty_kills_change_nothing_and_pay_nothing_twice(world, model, straight, tmp_path, idempotent):
    expected, seconds = straight
    model.idempotent, model.delay = idempotent, 0.1
    rng, out = random.Random(7), tmp_path / "city"
    command = [sys.executable, "-m", "mmrstraj_jax.build", *words(world, model, out)]
    kills, during_calls = 0, 0
    while kills < KILLS:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        before = sum(model.tries.values())
        # at a random moment, or, lest all kills meet Python starting, when a random number of calls was made
        moment = time.monotonic() + rng.uniform(0.1, 1.0) * seconds
        calls = rng.randrange(0, 4)
        while process.poll() is None and time.monotonic() < moment:
            if sum(model.tries.values()) > before + calls:
                break
            time.sleep(0.002)
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read().decode()
            break
        during_calls += model.active > 0
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    time.sleep(0.2)  # the server finishes what it had taken
    assert kills == KILLS, "the build ended too early to be killed so often"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert build_case.files(out) == expected
    twice = sum(count - 1 for count in model.paid.values())
    print(f"{kills} kills, {during_calls} with calls under way; {len(model.paid)} requests, {twice} twice")
    if idempotent:
        assert twice == 0
    else:
        # what holds with a server that ignores the header: at most the calls under way at the kills
        assert twice <= CONCURRENCY * kills
    # and the log never says less than what was billed
    logged = sum(_spent(out / name / "calls.jsonl") for name in ("rsi-instruct", "rsi-traffic"))
    assert sum(model.paid.values()) * PRICE <= logged + 1e-9


def _spent(path):
    from mmrstraj_jax.construction.calls import Log

    return Log(path).spent


def test_thirty_percent_failures_change_nothing(world, model, straight, tmp_path):
    kinds = [429, 500, 503, "hang", "cut", "garbage", "empty", "{not json", '{"answer": 3, "more": 1}']

    def behave(body, attempt):
        draw = random.Random(f"{text_of(body)}{attempt}{len(body['messages'])}")
        return draw.choice(kinds) if draw.random() < 0.3 and attempt < 5 else None

    model.behave = behave
    assert build.main(words(world, model, tmp_path / "city", concurrency=8, timeout=3)) == 0
    assert build_case.files(tmp_path / "city") == straight[0]
    calls, tries = len(model.tries), sum(model.tries.values())
    print(f"{calls} requests, {tries} tries, at most {max(model.tries.values())} of one")
    assert tries > 1.2 * calls and max(model.tries.values()) <= 6


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_bill_never_passes_the_cap_under_failures(world, model, tmp_path, concurrency):
    model.behave = lambda body, attempt: "hang" if random.Random(text_of(body)).random() < 0.2 else None
    model.idempotent = False
    cap = 0.02
    for _ in range(4):
        try:
            build.main(
                words(world, model, tmp_path / "city", concurrency=concurrency, timeout=3, max_cost=cap)
            )
        except UserError as error:
            assert "max-cost" in str(error) or "no answer" in str(error) or "in a row" in str(error)
    assert sum(model.paid.values()) * PRICE <= 2 * cap  # a cap for each of the two sets


def test_two_builds_in_one_folder(world, model, tmp_path):
    model.delay = 0.3
    command = words(world, model, tmp_path / "city", concurrency=1)
    process = subprocess.Popen([sys.executable, "-m", "mmrstraj_jax.build", *command], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not model.active:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process is building here"):
        build.main(command)
    process.kill()
    process.wait()
    assert (
        json.loads((tmp_path / "city" / "rsi-instruct" / "manifest.json").read_bytes())["status"]
        == "unfinished"
    )
