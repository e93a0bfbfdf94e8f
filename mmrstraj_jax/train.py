"""Trains one stage: `python -m mmrstraj_jax.train --config stage1`.

    --config NAME    stage0_align, stage1, stage2, or the path of a .py file (default stage1)
    --print-config   show every setting and stop
    --FIELD VALUE    override a setting: --model 7b --weights DIR --data A.json:0.7,B.json:0.3 --steps 100
    --help           all settings

The same command again goes on with an unfinished run; only if asked with other settings or data, or from the
start where no checkpoint is intact:

    --allow-config-change    --allow-fresh

Several processes: under SLURM and in Kubernetes they find each other, elsewhere each is started with

    --coordinator HOST:PORT --num-processes N --process-id I

Exit codes: 0 finished; 2 bad input, one line on stderr; 75 stopped by SIGINT or SIGTERM, saved at the next
step boundary, "run me again" (a second signal stops at once); 69 another process is dead or stuck, "run me
again"; 1 anything else (docs/reliability.md).
"""

import gc
import json
import os
import sys
import traceback
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmrstraj_jax import environment
from mmrstraj_jax.config import Config, format_config, load_config
from mmrstraj_jax.errors import UserError, run_command
from mmrstraj_jax.settings import take_flag, take_option

if TYPE_CHECKING:
    from mmrstraj_jax.training.distributed import Place


@dataclass(frozen=True)
class Launch:
    """What belongs to this start of a run and not to the run."""

    place: "Place | None" = None  # among other processes; None: alone
    allow_fresh: bool = False  # start over where no checkpoint is intact
    allow_config_change: bool = False  # go on with other settings or data


class Silent:
    """Stands in for log and monitor in every process but the first."""

    def __call__(self, *_) -> None:
        """Shows nothing."""

    open = row = amend = plot = close = __call__


def record(path: Path, value: dict) -> None:
    """Writes what a run found out. Raises SaveFailed."""
    from mmrstraj_jax.training import checkpoint, run

    try:
        run.write_json(path, value)
    except OSError as error:
        raise checkpoint.SaveFailed(
            f"{path}: cannot be written ({error.strerror}); finished checkpoints are untouched: make room, "
            "then the same command goes on"
        ) from error


def train(config: Config, overridden: frozenset[str] = frozenset(), launch: Launch = Launch()) -> Path:
    """Runs, or goes on with, the run of this config; returns its directory.

    Args:
        config: the whole run.
        overridden: dotted names of fields that were set by hand (load_config); named in errors and in the
            first line.
        launch: this process among others, and what is allowed at a resume.
    Raises:
        UserError: bad input, before anything is written where possible.
        Stopped: SIGINT or SIGTERM; the state is saved.
        Diverged: too many non-finite updates in a row, or nothing else; the last good checkpoint stands.
        FrozenWeightsChanged: a frozen leaf is not what it was; nothing was saved.
        SaveFailed: a checkpoint could not be written; those before it stand.
        LockLost: another run took the directory over; nothing was saved.
        WorkerFailed: reading a row hung, or killed a data worker; the steps before it are saved.
    """
    # Here, because --help and --print-config should not wait for JAX.
    import jax

    from mmrstraj_jax import parallel
    from mmrstraj_jax.data.loader import WorkerFailed
    from mmrstraj_jax.planning import flops, gpus
    from mmrstraj_jax.synthcity.sample import cache_root
    from mmrstraj_jax.training import compilation_cache, run, setup, sinks
    from mmrstraj_jax.training import state as states
    from mmrstraj_jax.training.checkpoint import Checkpoints, best_step
    from mmrstraj_jax.training.distributed import Processes, facts
    from mmrstraj_jax.training.lock import RunLock
    from mmrstraj_jax.training.monitor import Log, Meter, Monitor, parameter_table
    from mmrstraj_jax.training.optimizer import Optimizer, check_groups
    from mmrstraj_jax.training.resilience import MAX_SKIPPED, Diverged, Stopped, StopSignal
    from mmrstraj_jax.training.step import build_eval_step, build_step
    from mmrstraj_jax.training.validation import evaluate

    with StopSignal() as stop, Processes(launch.place, config.cluster) as processes, ExitStack() as stack:
        # What is trained on what, and may it start?
        beat = processes.watchdog.beat
        log = Log() if processes.primary else Silent()
        processes.agree("settings", facts(config))
        sinks.check_wandb(config.wandb)
        setup.check_length(config, overridden)
        sources = setup.sources(config)
        log(setup.describe(config, sources, overridden))
        run_dir = Path(config.run_dir or f"runs/{config.name}")
        allowed = {"allow_fresh": launch.allow_fresh, "allow_config_change": launch.allow_config_change}
        found = processes.from_first(lambda: run.status(run_dir, config, **allowed, say=log))
        if found == "finished":
            log(f"{run_dir} is finished: {json.dumps(run.read_json(run_dir / 'summary.json'))}")
            return run_dir
        if config.compilation_cache is not None:
            compilation_cache.use(config.compilation_cache, log)
        mesh = parallel.make_mesh(config.fsdp)
        micro_rows = setup.global_micro_batch(config) // processes.count
        lock = RunLock(run_dir, log)
        checkpoints = Checkpoints(run_dir / "checkpoints", config.keep_last, say=log)

        def claim() -> int | None:
            run.prepare(run_dir)
            stack.enter_context(lock)
            checkpoints.clean()
            return checkpoints.newest_intact(launch.allow_fresh) if found == "resume" else None

        saved_step = processes.from_first(claim)
        stack.enter_context(closing(checkpoints))

        # Model, then data: the tokenizer comes with the weights
        if saved_step is None:
            setup.check_start(config)
        start = run.start(config, mesh) if saved_step is None else run.reopen(run_dir, config, mesh)
        origin = start.base["init_from"]
        if saved_step is None and origin and not (Path(origin["run"]) / "summary.json").is_file():
            log(
                f"WARNING: {origin['run']} has not finished; the adapters of its step {origin['step']} go on "
                "here"
            )
        graphdef, trainable, frozen = states.split(start.model)
        check_groups(trainable, overridden)
        setup.check_views(config, start.anyres, overridden)
        data = setup.load_data(config, sources, start, cache_root() / "index", log)
        processes.agree("data and weights", data.fingerprints() | {"weights": start.base["fingerprint"]})
        trainable, frozen = (parallel.shard_parameters(tree, mesh) for tree in (trainable, frozen))
        total = setup.total_steps(config, data.train)
        optimizer = Optimizer(config.optim, total)
        opt_state = parallel.init_optimizer(optimizer.init, trainable, mesh)

        # Run directory and state
        first, saved = 0, {}
        meta = {"total_steps": total, "seed": config.seed} | data.fingerprints()
        if saved_step is None:
            base = start.base | {"frozen": states.checksum(frozen)}
            processes.from_first(lambda: run.create(run_dir, config, base, start.tokenizer_dir))
        else:
            base = start.base
            states.check_frozen(frozen, base["frozen"], "at the start")
            first, trainable, opt_state, saved = checkpoints.restore(saved_step, trainable, opt_state)
            run.check_resumable(run_dir, saved, meta, launch.allow_config_change, log)
            if first > total:
                raise UserError(
                    f"{run_dir}: {first} steps are done, more than the {total} asked for; name more --steps, "
                    "or a new --run-dir"
                )
            if launch.allow_config_change:
                if saved.get("eval_data", meta["eval_data"]) != meta["eval_data"]:
                    base = base | {"eval": {}}  # that was of other held-out rows
                processes.from_first(lambda: run.change_config(run_dir, config, base))
        if processes.primary and (problems := data.problems()):
            record(run_dir / "left_out.json", problems)
            log(f"all rows that are left out or remarked on: {run_dir / 'left_out.json'}")
        log.open(run_dir / "log.txt")
        for line in parameter_table(trainable, frozen, config.optim):
            log(line)

        if first:
            log(f"going on after step {first} of {total} in {run_dir}")
        monitor = Monitor(run_dir, first, total, log, config.wandb) if processes.primary else Silent()
        stack.enter_context(closing(monitor))
        gpu = gpus.of_kind(jax.devices()[0].device_kind)
        work = flops.of_step(start.config, data.train.index.shapes, data.train.schedule)
        meter = Meter(work, gpu and gpu.tflops * 1e12 * jax.device_count())
        told_to_stop = processes.vote(stop, mesh)
        train_step = build_step(
            graphdef, optimizer, config, placed=parallel.shardings_of((trainable, opt_state))
        )
        eval_step = build_eval_step(graphdef, mesh)

        def eval_due(done) -> bool:
            return done == total or (config.eval_every > 0 and done % config.eval_every == 0)

        def write_row(step, metrics, num_samples) -> None:
            row = meter.row(step, metrics, num_samples)
            if step % config.log_every == 0 or eval_due(step) or row["skipped"]:
                monitor.row(row)
            if row["skipped"]:
                ids = ", ".join(str(name) for name in data.train.ids(step - 1) if name is not None)
                log(
                    f"WARNING: step {step}: loss {row['loss']}, grad_norm {row['grad_norm']}: not usable, "
                    f"update not applied ({row['skipped']} in a row); rows {ids}"
                )
                if row["skipped"] >= MAX_SKIPPED:
                    raise Diverged(
                        f"{run_dir}: {MAX_SKIPPED} updates in a row were not usable, the last at step {step} "
                        f"(rows {ids}); look at these rows, or lower the learning rates"
                    )

        def score(step) -> dict[str, float]:
            def interrupted() -> bool:
                beat(f"evaluating after step {step}")
                return told_to_stop()

            scores = evaluate(eval_step, trainable, frozen, data, mesh, interrupted)
            if scores:
                monitor.amend(step, scores)
                log(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            meter.pause()
            return scores

        def save(done, scores) -> None:
            states.check_frozen(frozen, base["frozen"], f"step {done}")
            beat(f"saving step {done}")
            if processes.primary:
                lock.check()
            checkpoints.save(done, trainable, opt_state, meta, scores.get("eval_loss"))
            monitor.plot()
            meter.pause()

        def stopped(done) -> Stopped:
            checkpoints.wait()
            processes.meet()
            why = stop.requested or "another process was told to stop:"
            if not done:
                return Stopped(f"{why} before the first step: nothing to save")
            return Stopped(f"{why} after step {done} of {total}, which is saved; run it again")

        # Tracing makes objects by the million: the collector need not look through all older ones each time
        gc.freeze()
        stack.callback(gc.unfreeze)
        # The largest program first, on a copy and on padding: memory that does not suffice shows now
        if (largest := data.train.schedule.largest(first, total)) is not None:
            blank = setup.fold(data.train.blank(largest), micro_rows)
            copy = jax.tree.map(jax.numpy.copy, (trainable, opt_state))
            blank = parallel.shard_batch(blank, mesh, batch_axis=1)
            train_step.lower(*copy, frozen, blank, first).compile()
            processes.meet()  # collectives give up on a process that compiles half a minute longer
            jax.block_until_ready(train_step(*copy, frozen, blank, first))
            del copy, blank
            meter.pause()

        if first == 0 and "eval" not in base:  # what training has to beat
            base = base | {"eval": score(0)}
            if processes.primary:
                record(run_dir / "base.json", base)

        # Loop: the metrics of a step are read while the next one computes
        stop.arm()
        processes.watchdog.arm()
        scores: dict[str, float] = {}
        if first and eval_due(first) and data.held_out is not None:
            unscored = saved["eval_loss"] is None  # stopped in this evaluation
            if unscored or first == total:
                scores = score(first)
                if not scores:
                    raise stopped(first)
            if unscored and processes.primary:
                checkpoints.amend(first, scores["eval_loss"])
        beat(f"preparing the batch of step {first + 1}")
        done, newest, pending, broken = first, first, None, None
        alone = processes.count == 1  # several stop together, at a step that all have begun
        batches = data.train.iterate(first, total, told_to_stop if alone else lambda: False)
        stack.enter_context(closing(batches))
        try:
            for step, _, batch in meter.fetch(batches):
                num_samples = data.train.schedule.num_samples(step)
                beat(f"running step {step + 1}")
                batch = parallel.shard_batch(setup.fold(batch, micro_rows), mesh, batch_axis=1)
                trainable, opt_state, metrics = train_step(trainable, opt_state, frozen, batch, step)
                checkpoints.check()
                if pending is not None:
                    write_row(*pending)
                done, pending = step + 1, (step + 1, metrics, num_samples)
                stopping = told_to_stop()
                if eval_due(done) or stopping or done % config.save_every == 0:
                    write_row(*pending)
                    pending = None
                    scores = score(done) if eval_due(done) and not stopping else {}
                    save(done, scores)
                    newest = done
                    if told_to_stop() and (done < total or not scores):
                        raise stopped(done)
                beat(f"preparing the batch of step {done + 1}")
        except (WorkerFailed, UserError) as error:  # a row that cannot be read
            broken = error
        if broken or done < total:  # or told to stop while it waited for a batch
            if alone and pending is not None:
                write_row(*pending)
            if alone and done > newest:
                save(done, {})
            ending = broken or stopped(done)
            ending.at_once = True  # a thread may still be reading
            raise ending
        applied = int(opt_state.adam.count)
        if not applied:
            raise Diverged(
                f"{run_dir}: none of the {total} updates was usable; look at the rows named above, or lower "
                "the learning rates, and name a new --run-dir"
            )
        compiled, buckets = train_step._cache_size(), len(data.train.schedule.buckets)
        log(
            # never seen, and no reason to lose a finished run
            ("WARNING: " if compiled > buckets else "")
            + f"{compiled} compiled train programs for {buckets} buckets, "
            f"{eval_step._cache_size()} for evaluation"
        )

        # Only now the run is finished
        beat("finishing")
        checkpoints.wait()
        monitor.plot()
        if processes.primary:
            best = best_step(run_dir / "checkpoints")
            summary = {"steps": total, "skipped": total - applied, "best_step": best}
            summary |= {"before": base["eval"]} | scores
            record(run_dir / "summary.json", summary)
        processes.meet()
        for name in ("eval_loss", "eval_accuracy"):
            if name in scores and name in base["eval"]:
                log(f"held-out {name.removeprefix('eval_')}: {base['eval'][name]:.4f} -> {scores[name]:.4f}")
        log(
            f"The run lies in {run_dir} ({jax.device_count()} {jax.default_backend()} device(s), "
            f"{total} steps)"
        )
    return run_dir


def main(args: list[str]) -> int:
    from_user, args = take_option(args, "--config")
    show, args = take_flag(args, "--print-config")
    fresh, args = take_flag(args, "--allow-fresh")
    change, args = take_flag(args, "--allow-config-change")
    place = []
    for name in ("--coordinator", "--num-processes", "--process-id"):
        value, args = take_option(args, name)
        place.append(value)
    config, overridden = load_config(from_user or "stage1", args)
    if show:
        print(format_config(config))
        return 0
    environment.check(os.environ, print)
    from mmrstraj_jax.data.loader import WorkerFailed
    from mmrstraj_jax.training.checkpoint import SaveFailed
    from mmrstraj_jax.training.distributed import find_place, leave
    from mmrstraj_jax.training.lock import LockLost
    from mmrstraj_jax.training.resilience import EXIT_STOPPED, Diverged, Stopped

    several = False
    try:
        found = find_place(tuple(place), os.environ)
        several = found is not None
        train(config, overridden, Launch(found, fresh, change))
    except Stopped as stopped:
        print(f"stopped: {stopped}")
        return leave(EXIT_STOPPED, several or stopped.at_once)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return leave(2, several)
    except (WorkerFailed, SaveFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        # The interpreter's clean end would wait for a thread that reads a row, or show what Orbax left behind
        return leave(1, at_once=True)
    except (Diverged, LockLost) as error:
        print(f"error: {error}", file=sys.stderr)
        return leave(1, several)
    except Exception:
        traceback.print_exc()
        return leave(1, several)  # not raised: the clean end would wait for processes that are gone
    return 0


if __name__ == "__main__":
    run_command(main)
