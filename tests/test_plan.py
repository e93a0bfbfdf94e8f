"""The preflight: memory buffer by buffer against compiled programs, FLOPs, strategies, the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_case as case

from mmrstraj_jax import plan
from mmrstraj_jax.config import MODEL_PRESETS, Config, LoRAConfig, small_model
from mmrstraj_jax.data.collate import Shape
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models import attention
from mmrstraj_jax.planning import dataset, dryrun, flops, gpus, memory, preview, program, report, strategy

TINY = MODEL_PRESETS["tiny"]


def config(remat: str, rows: int = 1, dropout: float = 0.0, **more) -> Config:
    base = small_model(Config(model="tiny"))
    changes = {"remat": remat, "batch_size": rows, "micro_batch_size": rows} | more
    return dataclasses.replace(base, lora=LoRAConfig(dropout=dropout), **changes)


# ---- memory ----


def compare(settings: Config, model, shape: Shape) -> tuple[float, float]:
    """(predicted / compiled peak, predicted / compiled arguments), attention scores materialised."""
    found = memory.estimate(settings, model, shape, gpu=False)
    real = program.memory_of(program.compile_step(settings, model, shape))
    print(f"predicted {found.peak / 1e6:.1f} MB, compiled {real.peak / 1e6:.1f} MB")
    arguments = sum(count for name, count in found.resident.items() if name != "gradients")
    return found.peak / real.peak, arguments / real.arguments


@pytest.mark.parametrize(
    "remat, rows, dropout, shape",
    [
        ("none", 2, 0.0, Shape(2, 256, 64, 0, True)),
        ("none", 1, 0.05, Shape(5, 128, 32, 0, True)),
        ("dots", 1, 0.0, Shape(5, 256, 64, 0, True)),
    ],
)
def test_peak_memory_is_the_compilers_within_10_percent(remat, rows, dropout, shape):
    peak, arguments = compare(config(remat, rows, dropout), TINY, shape)
    assert abs(peak - 1) < 0.10 and abs(arguments - 1) < 0.001, (peak, arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, remat, rows, shape",
    [
        ("tiny", "none", 4, Shape(5, 512, 96, 0, True)),
        ("tiny", "block", 2, Shape(3, 256, 64, 0, True)),
        ("tiny", "dots", 4, Shape(5, 512, 96, 0, True)),
        ("mini", "none", 1, Shape(2, 256, 64, 0, True)),
        ("mini", "block", 2, Shape(2, 256, 64, 0, True)),
        ("mini", "dots", 1, Shape(1, 128, 128, 0, False)),
        ("0.5b", "none", 1, Shape(1, 512, 64, 0, False)),
        ("0.5b", "block", 1, Shape(2, 1024, 128, 0, True)),
        ("0.5b", "dots", 1, Shape(2, 1024, 128, 0, True)),
    ],
)
def test_peak_memory_of_shapes_and_remat_policies(model, remat, rows, shape):
    settings = dataclasses.replace(config(remat, rows), model=model)
    peak, arguments = compare(settings, MODEL_PRESETS[model], shape)
    assert abs(peak - 1) < 0.10 and abs(arguments - 1) < 0.001, (peak, arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, remat, fsdp, micro_batches, shape",
    [
        ("tiny", "none", 2, 1, Shape(2, 256, 64, 0, True)),
        ("tiny", "block", 2, 2, Shape(2, 256, 64, 0, True)),
        ("tiny", "dots", 2, 1, Shape(2, 256, 64, 0, True)),
        ("mini", "none", 4, 2, Shape(2, 256, 64, 0, True)),
        ("mini", "block", 4, 1, Shape(2, 256, 64, 0, True)),
        ("mini", "dots", 2, 1, Shape(1, 128, 128, 0, True)),
    ],
)
def test_peak_memory_of_a_device_that_holds_a_part_of_the_weights(model, remat, fsdp, micro_batches, shape):
    settings = dataclasses.replace(
        config(remat), model=model, fsdp=fsdp, batch_size=fsdp * micro_batches, micro_batch_size=1
    )
    real = dryrun.compiled(settings, MODEL_PRESETS[model], shape, fsdp).peak
    found = dryrun.predicted(settings, MODEL_PRESETS[model], shape, fsdp)
    print(f"predicted {found / 1e6:.1f} MB, compiled {real / 1e6:.1f} MB")
    assert abs(found / real - 1) < 0.10


def test_recomputing_saves_memory_and_fused_attention_holds_no_scores():
    shape = Shape(2, 1024, 64, 0, True)
    peaks = [memory.estimate(config(remat), TINY, shape).peak for remat in ("none", "dots", "block")]
    assert peaks == sorted(peaks, reverse=True)
    kept = {
        fused: memory.estimate(config("none"), TINY, shape, gpu=fused).peak_phase.buffers
        for fused in (True, False)
    }
    scores = 4 * 3 * 1024**2 / 2 * TINY.text.num_hidden_layers  # float32, 3 heads, not what is behind
    assert kept[False]["saved by the decoder"] - kept[True]["saved by the decoder"] > scores
    # with fused attention everything grows with the length, nothing with its square
    doubled = memory.estimate(config("none"), TINY, shape._replace(length=2048)).peak_phase.buffers
    assert doubled["saved by the decoder"] < 2.01 * kept[True]["saved by the decoder"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dots_keeps_the_attention_of_xla_and_not_a_fused_one(dtype, monkeypatch):
    settings, shape = dataclasses.replace(config("dots"), dtype=dtype), Shape(2, 512, 96, 0, True)
    monkeypatch.setattr(memory, "_phases", memory._phases.__wrapped__)  # its cache knows nothing of names

    def kept(gpu):
        buffers = memory.estimate(settings, TINY, shape, gpu=gpu).phases[0].buffers
        return buffers["saved by the tower"], buffers["saved by the decoder"]

    named, fused = kept(gpu=False), kept(gpu=True)
    monkeypatch.setattr(attention, "checkpoint_name", lambda x, name: x)
    assert fused == kept(gpu=False) and named > fused


def test_fsdp_splits_what_the_sharding_table_splits_and_gathers_a_layer_at_a_time():
    shape, settings = Shape(2, 256, 64, 0, True), config("block")
    whole, split, cpu = (
        memory.estimate(settings, TINY, shape, fsdp=fsdp, gpu=gpu)
        for fsdp, gpu in ((1, True), (4, True), (4, False))
    )
    assert split.resident["frozen weights"] < 0.3 * whole.resident["frozen weights"]
    layer = 4 * flops.decoder_layer(TINY.text)
    for found, layers in ((split, 3), (cpu, 2)):  # the last layer is apart from the loop
        backward = next(phase for phase in found.phases if phase.name == "decoder backward")
        assert backward.buffers["gathered layers"] == layers * layer
    # of several micro-batches the first gathers the head for all; of a single one the loss gives it back
    head = 4 * flops.parameters(TINY).head
    assert head < split.phases[0].buffers["gathered head"] < 1.5 * head
    several = memory.estimate(dataclasses.replace(settings, batch_size=4), TINY, shape, fsdp=4)
    assert several.resident["gathered head"] == split.phases[0].buffers["gathered head"]


def test_wire_bytes_are_those_of_the_leaves_that_are_split():
    """2 (n - 1) / n of the gradients, (n - 1) / n of what is gathered, as often as it is."""
    settings = config("block")
    tree = program.abstract_model(settings, TINY)
    gradients = 4 * sum(leaf.size for leaf in tree.trainable.values())
    assert strategy.wire_bytes(settings, TINY, 1, 1) == 0
    alone = strategy.wire_bytes(settings, TINY, 8, 1)
    assert alone == pytest.approx(2 * 7 / 8 * gradients)
    divides_nothing = strategy.wire_bytes(settings, TINY, 7, 7)
    assert divides_nothing == pytest.approx(2 * 6 / 7 * gradients)
    counts = flops.parameters(TINY)
    layers = 4 * (counts.decoder + counts.tower)
    single = 4 * (counts.head + counts.projector)
    found = strategy.wire_bytes(settings, TINY, 8, 8) - alone
    assert found == pytest.approx(7 / 8 * (2 * layers + single), rel=0.05)  # adapters come on top
    two = strategy.wire_bytes(dataclasses.replace(settings, batch_size=2), TINY, 8, 8) - 2 * alone
    assert two == pytest.approx(2 * found - 7 / 8 * single, rel=0.01)


def test_a_tower_that_does_not_train_keeps_nothing_and_runs_once():
    """Stage 0 trains the projector only."""
    frozen = LoRAConfig(vision_tower=(), projector=(), dropout=0.0)
    stage0 = dataclasses.replace(config("none"), lora=frozen, train_full=("projector",))
    shape = Shape(5, 256, 64, 0, True)
    kept = memory.estimate(stage0, TINY, shape).peak_phase.buffers
    assert kept["saved by the tower"] == 0 and kept["saved by the decoder"] > 0
    row = flops.of_row(TINY, *shape[:3])
    backward = row.tower_linear + 2 * row.tower_attention
    assert row.training(config("none")) - row.training(stage0) == pytest.approx(backward)


def test_residuals_leave_parameters_out():
    weight = jax.ShapeDtypeStruct((8, 8), "float32")
    x = jax.ShapeDtypeStruct((4, 8), "float32")

    def function(weight, x, fixed):
        return jnp.sin(x @ weight) @ fixed

    kept = memory.residuals(function, (weight, x), (weight,), keep_varied=1)
    assert sorted(leaf.shape for leaf in kept) == [(4, 8), (4, 8)]  # x for dW, the cosine


# ---- FLOPs, floors, strategies ----


@pytest.mark.parametrize(
    "model, views, length, forward, plain, recomputed",
    [
        ("0.5b", 5, 2150, 5.00, 10.6, 15.6),
        ("0.5b", 37, 7521, 31.7, 68.9, 100.4),
        ("7b", 5, 2150, 32.5, 66.3, 98.5),
        ("7b", 10, 7440, 115, 242, 357),
    ],
)
def test_flops_of_the_public_sizes(model, views, length, forward, plain, recomputed):
    """Counted by hand from the layer shapes, 150 supervised positions."""
    row = flops.of_row(MODEL_PRESETS[model], views, length, 150)
    found = [row.forward, *(row.training(Config(remat=remat)) for remat in ("none", "block"))]
    np.testing.assert_allclose(np.array(found) / 1e12, [forward, plain, recomputed], rtol=0.02)


def test_parameters_are_those_of_the_model():
    tree = program.abstract_model(Config(model="0.5b"), MODEL_PRESETS["0.5b"])
    matrices = sum(
        leaf.size
        for name, leaf in tree.frozen.items()
        if name.endswith(".weight") and "norm" not in name and "position" not in name
    )
    assert sum(dataclasses.astuple(flops.parameters(MODEL_PRESETS["0.5b"]))) == matrices


def test_four_n_counts_real_tokens():
    counts = flops.parameters(TINY)
    (one,) = flops.four_n(TINY, np.array([[2, 300, 40, 0, 1]]))
    visual = (counts.tower + counts.projector) * 2 * TINY.vision.num_patches
    assert one == 4 * (visual + counts.decoder * 300 + counts.head * 40)


def test_the_paper_s_model_needs_no_sharding_on_a_40_gb_card():
    rows, bucket = np.array([[5, 2150, 150, 0, 1]]), Shape(5, 2304, 160, 0, True)
    found = strategy.options(Config(model="7b"), MODEL_PRESETS["7b"], [bucket], rows, 8)
    best, why = strategy.recommend(found, gpus.find("A100-40"))
    assert best.fsdp == 1 and "fit on every device" in why
    replicated, split = (next(o for o in found if o.remat == "block" and o.fsdp == n) for n in (1, 8))
    assert 15 < replicated.memory.peak / 2**30 < 20  # weights alone are 14.96
    assert replicated.wire_bytes < 40e6 and split.wire_bytes > 25e9
    assert strategy.recommend(found, dataclasses.replace(gpus.find("a100-40"), memory=14))[0].fsdp == 8
    none, why = strategy.recommend(found, dataclasses.replace(gpus.find("a100-40"), memory=2))
    assert none is None and "nothing fits" in why


def test_gpus_by_name_and_by_device_kind():
    assert gpus.of_kind("NVIDIA A100-SXM4-40GB") == gpus.find("A100-40")
    assert gpus.of_kind("NVIDIA H100 80GB HBM3") == gpus.find("h100")
    assert gpus.of_kind("cpu") is None
    with pytest.raises(UserError, match="--gpus A1000: expected some of a100-40"):
        gpus.find("A1000")


# ---- the command ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return case.world(tmp_path_factory.mktemp("plan"))


def arguments(world, *more: str) -> list[str]:
    named = [word for key in ("weights", "data") for word in (f"--{key}", world[key])]
    return ["--model", "tiny", *named, "--batch-size", "4", "--micro-batch-size", "2", *more]


def test_a_plan_of_a_data_set(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MMRSTRAJ_CACHE", str(tmp_path))
    rows = json.loads(open(world["data"]).read())
    rows[2]["conversations"][0]["value"] = "<image>\n<b>&amp; Straße 橋</b>"
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    root = str(case.Path(world["data"]).parent)
    page = tmp_path / "page.html"
    words = arguments(world | {"data": str(data)}, "--image-root", root, "--preview", str(page))
    assert plan.main([*words, "--gpus", "h100", "--devices", "2"]) == 0
    shown = capsys.readouterr().out
    for part in ("views a row", "buckets:", "parameters", "TFLOP of a mean row", "fsdp 2, remat block"):
        assert part in shown
    assert "h100: replicated, remat none (--remat none --fsdp 1): weights fit on every device" in shown
    text = page.read_text(encoding="utf-8")
    assert "&lt;" in text and "<b>" not in text and "橋" in text
    assert "class='learn'" in text and "visual tokens" in text and "data:image/jpeg;base64," in text


def test_tokens_of_the_preview_are_those_of_the_batch(world, tmp_path, monkeypatch):
    monkeypatch.setenv("MMRSTRAJ_CACHE", str(tmp_path))
    settings = case.config(weights=world["weights"], data=world["data"])
    found = dataset.inspect(settings, lambda _: None)
    example = found.loader._example(0)
    spans = preview._tokens(example, found.loader.tokenizer)
    answers = spans.count("class='learn'")
    assert answers == example.answer.sum()
    assert f"{example.plans[0].num_tokens} visual tokens" in spans


def test_rows_of_padding_are_not_real_and_packs_count_as_rows(world, tmp_path, monkeypatch):
    monkeypatch.setenv("MMRSTRAJ_CACHE", str(tmp_path))
    settings = case.config(weights=world["weights"], data=world["data"], batch_size=8, max_length=128)
    found = dataset.inspect(settings, lambda _: None)
    schedule = found.loader.schedule
    room = 8 * sum(schedule.batch(step)[0].length for step in range(2))
    line = report.buckets(found, settings)[0]  # 12 rows in two steps of 8
    assert "2 steps an epoch" in line
    assert f"{100 * found.shapes[:, 1].sum() / room:.0f} % of their tokens" in line
    packed = dataclasses.replace(settings, packing=True)
    found = dataset.inspect(packed, lambda _: None)
    assert found.drawn[:, 1].sum() == found.shapes[:, 1].sum() and len(found.drawn) < len(found.shapes)
    assert f", {found.drawn[:, 1].mean():.0f} tokens, remat" in report.work(found, packed)[1]
    assert " % of their tokens" in report.buckets(found, packed)[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpus", "tpu"], "--gpus tpu: expected some of"),
        (["--devices", "3", "--batch-size", "4"], "--devices 3: expected a divisor of batch_size 4"),
        (["--devices", "many"], "--devices many: expected a whole number"),
        (["--data", "missing.json"], "missing.json"),
        (["--previw", "x.html"], "unknown option --previw: did you mean --preview"),
        (["--stepz", "3"], "unknown option --stepz: did you mean --steps"),
        # what training would refuse
        (["--batch-size", "24", "--devices", "4"], "batch_size 24: cannot be split into micro-batches of 4"),
        (["--fsdp", "3", "--devices", "4"], "--fsdp 3: expected a divisor of --devices 4"),
        (["--train-full", "projector"], "train_full projector: has LoRA targets too"),
        (["--lora.vision-tower", "--lora.projector"], "nothing to train"),
        (["--optim.other-lr", "1"], "optim.other_lr: group 'other' has no trainable parameter"),
        (["--init-from", "nowhere"], "--init-from nowhere: not a run directory"),
        (["--epochs", "2"], "--epochs 2: this recipe counts steps"),
        (["--merge-init"], "--merge-init: merges the adapters of a finished run"),
    ],
)
def test_mistakes_are_user_errors(world, tmp_path, monkeypatch, words, message):
    monkeypatch.setenv("MMRSTRAJ_CACHE", str(tmp_path))
    words = ["--weights", world["weights"], "--model", "tiny", *words]
    if "--data" not in words:
        words += ["--data", world["data"]]
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        plan.main(words)


@pytest.mark.slow
def test_dry_run_compiles_for_several_devices():
    settings = case.config(batch_size=2, micro_batch_size=1, fsdp=2)
    shape = Shape(2, 16, 8, 0, False)
    result = dryrun.compiled(settings, case.MODEL, shape, 2)
    alone = dryrun.compiled(dataclasses.replace(settings, fsdp=1), case.MODEL, shape, 2)
    assert 0 < result.arguments < alone.arguments  # weights are split
    with pytest.raises(UserError, match="--dry-run: the step does not compile for 3 devices"):
        dryrun.compiled(settings, case.MODEL, shape, 3)
