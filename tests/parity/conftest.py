from pathlib import Path

import pytest

import mmrstraj_jax

from . import cases, ours

GOLDEN = Path(__file__).parent / "golden.npz"


@pytest.fixture(scope="session", params=list(cases.CHECKPOINTS))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("parity")
    return {name: cases.write_folder(name, where / name) for name in cases.CHECKPOINTS}


@pytest.fixture(scope="session")
def models(folders):
    return {
        name: mmrstraj_jax.load(folder, dtype="float32", batch_size=16) for name, folder in folders.items()
    }


@pytest.fixture(scope="session")
def outputs(models):
    """Our outputs of every sample, computed once for the live and the golden tests."""
    return {name: ours.run(model, cases.samples(name)) for name, model in models.items()}


@pytest.fixture(scope="session")
def answers(models):
    """Our greedy ids for every sample, from one batched call."""
    found = {}
    for name, model in models.items():
        rows = cases.samples(name)
        found[name] = model.generate(
            [sample.ids for sample in rows],
            images=[sample.images for sample in rows],
            videos=[[sample.frames] if sample.frames else [] for sample in rows],
            max_new_tokens=cases.NEW_TOKENS,
        )
    return found


@pytest.fixture(scope="session")
def adapters(models):
    return ours.training(models["untied"], cases.samples("untied"), **cases.LEARNING_RATES)
