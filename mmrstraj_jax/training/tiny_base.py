"""Makes the tiny base model that ships with the package, from nothing but seeds.

    python -m mmrstraj_jax.training.tiny_base --out tiny --work runs/tiny_base

Phases, each resumable by the same command: images, labels and tokenizer; the tower on dense ground truth; the
language model on text; projector and language model on the finished tower; everything together at a lower
rate; the result as bfloat16, with its score on held-out questions. The settings are those of
configs/tiny_base.py.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmrstraj_jax import parallel
from mmrstraj_jax.config import MODEL_PRESETS, TRAINABLE_PARTS, Config, load_config
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.errors import UserError, run_command
from mmrstraj_jax.models.lora import train_in_full
from mmrstraj_jax.models.mmrstraj import MMRSTraj, init_model
from mmrstraj_jax.synthcity.tokenizer import train_tokenizer
from mmrstraj_jax.training import shared_prefix, state, tiny_data
from mmrstraj_jax.training.dense import Heads, dense_losses, total
from mmrstraj_jax.training.muon import Muon, Tree
from mmrstraj_jax.training.pointing import TokenPlaces, pointing_loss
from mmrstraj_jax.training.shared_prefix import Segments
from mmrstraj_jax.training.tiny_text import GroupText, ShownFacts, stated_rows, text_rows
from mmrstraj_jax.weights import native

QUESTIONS = 16  # an image, of those it has, drawn anew at every visit
TEXT_ROWS, STATED_ROWS = 2, 8  # a step: text-only conversations; short questions that state their facts
WORDS_BATCH = 4, 32  # the same in the words phase
POINTING = 0.3  # weight of pointing_loss
LOOKING_LAYER = 1  # whose attention is taught where to look
DENSE = 0.1  # weight of the tower's dense losses where it learns on


@dataclasses.dataclass(frozen=True)
class Phase:
    """One of the language phases, in order; the tower is frozen in the first."""

    steps: int
    joint: bool
    rate: float  # of the config's learning rates
    shown: float  # share of the images that are shown words


PHASES = {
    "frozen": Phase(1200, False, 1.0, 0.0),
    "joint": Phase(2500, True, 0.5, 0.0),
    "shown": Phase(800, True, 0.3, 0.3),
}
TOWER_BATCH = 8  # images of a step of the dense phase, of 2 to 7 views each
SAVE_EVERY, REPORT_EVERY = 250, 50
# Two devices of one thread each: at these sizes threads inside an operation wait for each other more than
# they work. Freed memory is kept, in huge pages: page faults took a quarter of the time.
ENVIRONMENT = {
    "XLA_FLAGS": "--xla_cpu_prefer_vector_width=512 --xla_cpu_multi_thread_eigen=false",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456",
}
DEVICES = 2


def fit(
    path: Path,
    loss: Callable[..., tuple[jax.Array, dict]],
    trainable: Tree,
    frozen: Tree,
    optimizer: Muon,
    steps: int,
    batches: Callable[[int], tuple[int, object]],
) -> Tree:
    """Trains for `steps` steps, or goes on, or reads the finished result: `path` holds it.

    Args:
        loss: (trainable, frozen, group, batch) -> scalar, metrics; one program for each group.
        batches: step -> (group, host batch).
    Raises:
        UserError: `path` was made with another number of steps.
    """
    if path.exists():
        return _read(path, trainable, steps)
    replicated = jax.NamedSharding(optimizer.mesh, jax.P())

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=(0, 1))
    def step_fn(trainable, opt_state, frozen, group, batch):
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, group, batch)
        return *optimizer.update(grads, opt_state, trainable), metrics

    trainable, frozen = jax.device_put((trainable, frozen), replicated)
    carried = trainable, jax.device_put(optimizer.init(trainable), replicated)
    partial_path, start = path.with_suffix(".partial.npz"), 0
    if partial_path.exists():
        carried = jax.device_put(_read(partial_path, carried, steps), replicated)
        start = int(carried[1].step)
    seen, began = [], time.monotonic()
    for step in range(start, steps):
        group, batch = batches(step)
        *carried, metrics = step_fn(
            *carried, frozen, group, parallel.shard_batch(batch, optimizer.mesh, batch_axis=0)
        )
        # One step at a time: two in flight can wait for each other's devices without end
        seen.append(jax.block_until_ready(metrics))
        if (step + 1) % REPORT_EVERY == 0:
            means = {name: np.mean([float(metrics[name]) for metrics in seen]) for name in seen[0]}
            pace = (step + 1 - start) / (time.monotonic() - began)
            print(
                f"{path.stem} {step + 1}/{steps} {pace:.2f}/s",
                *(f"{k} {v:.3f}" for k, v in means.items()),
                flush=True,
            )
            seen = []
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < steps:
            _write(partial_path, tuple(carried), steps)
    _write(path, carried[0], steps)
    partial_path.unlink(missing_ok=True)
    return _read(path, carried[0], steps)


def _write(path: Path, tree, steps: int) -> None:
    temporary = path.with_name(f"_{path.name}")
    np.savez(temporary, *map(np.asarray, jax.tree.leaves(tree)), steps=steps)
    temporary.replace(path)


def _read(path: Path, like, steps: int):
    structure = jax.tree.structure(like)
    with np.load(path) as arrays:
        made_with = arrays.get("steps", steps)  # work of an earlier version does not say
        if made_with != steps:
            raise UserError(
                f"{path}: of a phase of {made_with} steps, asked for are {steps}; give the options "
                "that it was made with, or name another --work"
            )
        leaves = [jnp.asarray(arrays[f"arr_{k}"]) for k in range(structure.num_leaves)]
    return jax.tree.unflatten(structure, leaves)


@dataclasses.dataclass
class Workshop:
    """What all phases share."""

    config: Config
    work: Path
    mesh: jax.sharding.Mesh
    groups: list[tiny_data.Group]
    tokenizer: Tokenizer

    @functools.cached_property
    def texts(self) -> list[GroupText]:
        return [GroupText.of(group, self.tokenizer) for group in self.groups]

    @functools.cached_property
    def plain(self) -> Segments:
        return text_rows(self.tokenizer)

    @functools.cached_property
    def stated(self) -> Segments:
        return stated_rows(self.tokenizer)

    @functools.cached_property
    def shown(self) -> ShownFacts:
        return ShownFacts.of(self.tokenizer, self.texts[0].prefix.num_ids, QUESTIONS)

    def draws(self, batch_size: int, steps: int, seed: int) -> list[tuple[int, np.ndarray]]:
        return list(tiny_data.draws(self.groups, batch_size, steps, seed))

    def tower(self, model: MMRSTraj, steps: int) -> Heads:
        """Dense pre-training of the tower in place; the read-outs that learned with it."""
        vision = model.vision_tower.config
        heads = Heads(vision.output_size, vision.grid_side, rngs=nnx.Rngs(params=jax.random.key(1)))
        both = nnx.Dict(vision_tower=model.vision_tower, heads=heads)
        graphdef, _, weights = state.split(both)

        def loss(weights: Tree, frozen: Tree, group: int, batch: tuple):
            both = state.merge(graphdef, weights, frozen)
            views, labels = batch
            features = both.vision_tower(views.reshape(-1, *views.shape[2:]))
            features = features.reshape(*views.shape[:2], *features.shape[1:])
            reduced_side = self.groups[group].plan.reduced_side
            losses = dense_losses(features, both.heads, labels, vision.grid_side, reduced_side)
            return total(losses), losses

        plan = self.draws(TOWER_BATCH, steps, 0)

        def batches(step: int):
            group, rows = plan[step]
            return group, (self.groups[group].views[rows], self.groups[group].labels(rows))

        optimizer = Muon(self.mesh, steps, matrix_lr=2e-3, adam_lr=1e-3)
        weights = fit(self.work / "tower.npz", loss, weights, {}, optimizer, steps, batches)
        both = state.merge(graphdef, weights, {})
        model.vision_tower = both.vision_tower
        return both.heads

    def words(self, model: MMRSTraj, steps: int) -> MMRSTraj:
        """The language model alone, on text."""
        train_in_full(model, ["language_model"])
        graphdef, trainable, frozen = state.split(model)
        kinds = self.plain, self.stated

        def loss(trainable: Tree, frozen: Tree, group: int, batch: list[Segments]):
            model = state.merge(graphdef, trainable, frozen)
            found = [self.read(model, rows) for rows in batch]
            (text, _), (stated, right) = found
            return text + stated, {"text": text, "stated": stated, "found": right.mean()}

        def batches(step: int):
            rng = np.random.default_rng((9, step))
            return 0, [
                rows.at(rng.integers(0, len(rows.ids), count))
                for rows, count in zip(kinds, WORDS_BATCH, strict=True)
            ]

        rate = self.config.optim.other_lr
        optimizer = Muon(self.mesh, steps, matrix_lr=2 * rate, adam_lr=rate)
        weights = fit(self.work / "words.npz", loss, trainable, frozen, optimizer, steps, batches)
        return state.merge(graphdef, weights, frozen)

    @staticmethod
    def read(model: MMRSTraj, rows: Segments) -> tuple[jax.Array, jax.Array]:
        """Loss and right answers of text-only rows."""
        hidden = model.language_model(model.language_model.embed(rows.ids))
        return shared_prefix.score(model, hidden[:, None], Segments(*(x[:, None] for x in rows)))

    def language(self, model: MMRSTraj, name: str, phase: Phase, heads: Heads) -> MMRSTraj:
        """Projector and language model on the tower as it is, or everything: then `heads`, the tower's
        read-outs, stay as they are and keep it saying what they read."""
        optim = self.config.optim
        train_in_full(model, [part for part in TRAINABLE_PARTS if phase.joint or part != "vision_tower"])
        graphdef, trainable, frozen = state.split(model)
        texts, plain, stated = self.texts, self.plain, self.stated
        tokens = [
            TokenPlaces.of(group.plan, len(text.prefix.ids))
            for group, text in zip(self.groups, texts, strict=True)
        ]

        def loss(trainable: Tree, frozen: Tree, group: int, batch):
            model = state.merge(graphdef, trainable, frozen)
            views, labels, questions, places, talk, text, short, said = batch
            seen = model.encode_views(views.reshape(-1, *views.shape[2:]))
            seen = seen.reshape(*views.shape[:2], *seen.shape[1:])
            pool = shared_prefix.image_tokens(model, seen, self.groups[group].plan.view_scale)
            at = np.arange(len(views))[:, None], said.slots
            words = model.language_model.embed(said.words)
            size = jnp.linalg.norm(pool[at], axis=-1) / jnp.linalg.norm(words, axis=-1)
            pool = pool.at[at].add(words * (said.scale * jax.lax.stop_gradient(size))[..., None])
            (prefix, asked, told), looks = shared_prefix.hidden_states(
                model, pool, texts[group].prefix, [questions.ids, talk.ids], questions.positions
            )
            pointing = pointing_loss(
                looks[LOOKING_LAYER], places, questions.weights.astype(bool), tokens[group]
            )
            ahead = model.logits(prefix[:, 0, -2])  # what follows the image is a newline
            newline = (jax.nn.logsumexp(ahead, axis=-1) - ahead[:, self.tokenizer.newline_id]).mean()
            answer_loss, correct = shared_prefix.score(model, asked, questions)
            talk_loss, _ = shared_prefix.score(model, told, talk)
            text_loss, _ = self.read(model, text)
            shown = said.scale.any(-1, keepdims=True)
            real, read = (questions.weights.any(-1) & chosen for chosen in (~shown, shown))
            metrics = {"answers": answer_loss, "talk": talk_loss, "text": text_loss, "pointing": pointing}
            metrics["right"] = (correct & real).sum() / jnp.maximum(real.sum(), 1)
            metrics["shown"] = (correct & read).sum() / jnp.maximum(read.sum(), 1)  # 0 where nothing is
            loss = answer_loss + 0.5 * talk_loss + 0.3 * text_loss + 0.02 * newline
            short_loss, found = self.read(model, short)
            metrics |= {"stated": short_loss, "found": found.mean()}
            loss += 0.3 * short_loss + POINTING * pointing
            if phase.joint:
                plan = self.groups[group].plan
                metrics["dense"] = total(dense_losses(seen, heads, labels, plan.side, plan.reduced_side))
                loss += DENSE * metrics["dense"]
            return loss, metrics

        seed = 1 + list(PHASES).index(name)
        plan = self.draws(self.config.batch_size, phase.steps, seed)

        def batches(step: int):
            group, rows = plan[step]
            rng = np.random.default_rng((seed, step))
            text = plain.at(rng.integers(0, len(plain.ids), TEXT_ROWS))
            short = stated.at(rng.integers(0, len(stated.ids), STATED_ROWS))
            found, asked = self.groups[group], texts[group].draw(rows, QUESTIONS, rng)
            slots = texts[group].prefix.visual_index[tokens[group].reach[:, 0] > 0]
            said = self.shown.show(asked, slots, phase.shown, rng)
            return group, (found.views[rows], found.labels(rows), *asked, text, short, said)

        optimizer = Muon(
            self.mesh, phase.steps,
            matrix_lr=phase.rate * optim.other_lr * 2, adam_lr=phase.rate * optim.other_lr,
            factors={"vision_tower": optim.tower_lr / optim.other_lr},
        )  # fmt: skip
        path = self.work / f"{name}.npz"
        return state.merge(
            graphdef, fit(path, loss, trainable, frozen, optimizer, phase.steps, batches), frozen
        )

    def evaluate(self, model: MMRSTraj, held_out: list[tiny_data.Group]) -> dict[str, float]:
        """Share of held-out answers that are right, by question type, by greedy exact match; and the same of
        the most frequent answer to the same question string in training."""
        graphdef, weights = nnx.split(model)
        right, common, answers = defaultdict(list), defaultdict(list), defaultdict(Counter)
        for group in self.groups:
            for text in group.texts:
                for _, question, answer in text:
                    answers[question][answer] += 1
        for group in held_out:
            text = GroupText.of(group, self.tokenizer)
            seen = features(model, group.views, self.mesh)

            @jax.jit
            def correct(weights, seen, questions, text=text, group=group):
                model = nnx.merge(graphdef, weights)
                pool = shared_prefix.image_tokens(model, seen.astype(jnp.float32), group.plan.view_scale)
                (_, hidden), _ = shared_prefix.hidden_states(
                    model, pool, text.prefix, [questions.ids], questions.positions
                )
                return shared_prefix.score(model, hidden, questions)[1]

            for row in range(len(group.views)):
                questions = text.questions.at(np.arange(row, row + 1))
                found = np.asarray(correct(weights, seen[row : row + 1], questions))[0]
                for k, (kind, question, answer) in enumerate(group.texts[row][:-1]):
                    if questions.weights[0, k].any():
                        right[kind].append(bool(found[k]))
                        common[kind].append(
                            answers[question].most_common(1)[:1] == [(answer, answers[question][answer])]
                        )
        for of in (right, common):
            of["overall"] = [x for kind in of for x in of[kind]]
        return {
            kind: {"n": len(right[kind]), "right": np.mean(right[kind]), "majority": np.mean(common[kind])}
            for kind in sorted(right)
        }


def features(model: MMRSTraj, views: np.ndarray, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Tower features [N, V, T, F] of images, float16."""
    graphdef, weights = nnx.split(model.vision_tower)
    tower = jax.jit(lambda weights, views: nnx.merge(graphdef, weights)(views).astype(jnp.float16))
    weights = jax.device_put(weights, jax.NamedSharding(mesh, jax.P()))
    flat, size, found = views.reshape(-1, *views.shape[2:]), 240, []
    for start in range(0, len(flat), size):
        part = flat[start : start + size]
        padded = np.pad(part, ((0, size - len(part)), (0, 0), (0, 0), (0, 0)))
        found.append(
            np.asarray(tower(weights, parallel.shard_batch(padded, mesh, batch_axis=0)))[: len(part)]
        )
    return np.concatenate(found).reshape(*views.shape[:2], *found[0].shape[1:])


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the finished model; must not exist"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_base"), help="data and phases")
    parser.add_argument("--images", type=int, default=13200)
    parser.add_argument("--tower-steps", type=int, default=2300)
    parser.add_argument("--words-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, help="of each language phase; default: those of PHASES")
    options = parser.parse_args(args)
    if options.out.exists():
        raise UserError(f"--out {options.out}: exists; remove it or name another folder")
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        command = [sys.executable, "-m", "mmrstraj_jax.training.tiny_base", *args]
        os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT})
    jax.config.update("jax_num_cpu_devices", DEVICES)
    config, _ = load_config("tiny_base", [], model="tiny")
    work: Path = options.work
    if not (work / "tokenizer.json").exists():
        train_tokenizer(work)
    groups = tiny_data.render(work / "base", "base", config.seed, options.images, config.anyres, drilled=True)
    held_out = tiny_data.render(work / "eval", "eval_base", config.seed, 720, config.anyres, drilled=False)
    tokenizer = Tokenizer((work / "tokenizer.json").read_text())
    workshop = Workshop(config, work, parallel.make_mesh(), groups, tokenizer)
    model = init_model(MODEL_PRESETS["tiny"], jax.random.key(config.seed))
    heads = workshop.tower(model, options.tower_steps)
    model = workshop.words(model, options.words_steps)
    for name, phase in PHASES.items():
        phase = dataclasses.replace(phase, steps=options.steps or phase.steps)
        model = workshop.language(model, name, phase, heads)
    native.save(
        model, MODEL_PRESETS["tiny"], config.anyres, options.out, dtype=jnp.bfloat16, tokenizer_dir=work
    )
    scores = workshop.evaluate(model, held_out)
    (work / "scores.json").write_text(json.dumps(scores, indent=1))
    for kind, row in scores.items():
        print(
            f"{kind:12} n {row['n']:5}  right {row['right']:6.1%}  question majority {row['majority']:6.1%}"
        )
    size = sum(path.stat().st_size for path in options.out.iterdir())
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    print(f"{options.out}: {count:,} parameters, {size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
