"""Trains one stage: `python -m mmrstraj_jax.train --config stage1`.

    --config NAME    stage0_align, stage1, stage2, or the path of a .py file (default stage1)
    --print-config   show every setting and stop
    --FIELD VALUE    override a setting: --model 7b --weights DIR --data A.json:0.7,B.json:0.3 --steps 100
    --help           all settings

The same command again goes on with an unfinished run. SIGINT or SIGTERM saves at the next step boundary and
exits with code 75 ("run me again"); a second one stops at once. Bad input: one line, exit code 2.
"""

import json
from contextlib import ExitStack, closing
from pathlib import Path

from mmrstraj_jax.config import Config, format_config, load_config
from mmrstraj_jax.errors import run_command
from mmrstraj_jax.settings import take_flag, take_option


def train(config: Config, overridden: frozenset[str] = frozenset()) -> Path:
    """Runs, or goes on with, the run of this config; returns its directory.

    Args:
        config: the whole run.
        overridden: dotted names of fields that were set by hand (load_config); named in errors and in the
            first line.
    Raises:
        UserError: bad input, before anything is written where possible.
        Stopped: SIGINT or SIGTERM; the state is saved.
        Diverged: too many non-finite updates in a row; the last good checkpoint stands.
        FrozenWeightsChanged: a frozen leaf is not what it was; nothing was saved.
    """
    # Here, because --help and --print-config should not wait for JAX.
    import jax

    from mmrstraj_jax import parallel
    from mmrstraj_jax.synthcity.sample import cache_root
    from mmrstraj_jax.training import run, setup
    from mmrstraj_jax.training import state as states
    from mmrstraj_jax.training.checkpoint import Checkpoints, best_step
    from mmrstraj_jax.training.monitor import Log, Meter, Monitor, parameter_table
    from mmrstraj_jax.training.optimizer import Optimizer, check_groups
    from mmrstraj_jax.training.resilience import MAX_SKIPPED, Diverged, Stopped, StopSignal
    from mmrstraj_jax.training.step import build_eval_step, build_step
    from mmrstraj_jax.training.validation import evaluate

    log = Log()
    with StopSignal() as stop, ExitStack() as stack:
        # What is trained on what, and may it start?
        sources = setup.sources(config)
        log(setup.describe(config, sources, overridden))
        run_dir = Path(config.run_dir or f"runs/{config.name}")
        found = run.status(run_dir, config)
        if found == "finished":
            log(f"{run_dir} is finished: {json.dumps(run.read_json(run_dir / 'summary.json'))}")
            return run_dir
        mesh = parallel.make_mesh()
        micro_rows = setup.global_micro_batch(config)

        # Model, then data: the tokenizer comes with the weights
        start = run.start(config) if found == "new" else run.reopen(run_dir, config)
        graphdef, trainable, frozen = states.split(start.model)
        check_groups(trainable, overridden)
        data = setup.load_data(config, sources, start, cache_root() / "index", log)
        trainable, frozen = (parallel.shard_parameters(tree, mesh) for tree in (trainable, frozen))
        total = setup.total_steps(config, data.train)
        optimizer = Optimizer(config.optim, total)
        opt_state = parallel.replicate_scalars(optimizer.init(trainable), mesh)

        # Run directory
        if found == "new":
            base = start.base | {"frozen": states.checksum(frozen)}
            run.create(run_dir, config, base, start.tokenizer_dir)
        else:
            base = start.base
            states.check_frozen(frozen, base["frozen"], "at the start")
        log.open(run_dir / "log.txt")
        for line in parameter_table(trainable, frozen, config.optim):
            log(line)

        # State
        checkpoints = stack.enter_context(
            closing(Checkpoints(run_dir / "checkpoints", config.keep_last, say=log))
        )
        first, meta = 0, {"total_steps": total, "seed": config.seed, "data": data.train.index.fingerprint}
        restored = checkpoints.restore(trainable, opt_state)
        if restored is not None:
            first, trainable, opt_state, saved = restored
            run.check_resumable(run_dir, saved, meta)
            log(f"going on after step {first} of {total} in {run_dir}")
        monitor = stack.enter_context(closing(Monitor(run_dir, first, total, log)))
        meter = Meter()
        train_step = build_step(
            graphdef, optimizer, config, placed=parallel.shardings_of((trainable, opt_state))
        )
        eval_step = build_eval_step(graphdef, config)

        def write_row(step, metrics, num_samples) -> None:
            row = meter.row(step, metrics, num_samples)
            if step % config.log_every == 0 or step == total or row["skipped"]:
                monitor.row(row)
            if row["skipped"]:
                ids = ", ".join(str(name) for name in data.train.ids(step - 1) if name is not None)
                log(
                    f"WARNING: step {step}: loss {row['loss']}, grad_norm {row['grad_norm']}: not finite, "
                    f"update not applied ({row['skipped']} in a row); rows {ids}"
                )
                if row["skipped"] >= MAX_SKIPPED:
                    raise Diverged(
                        f"{run_dir}: {MAX_SKIPPED} updates in a row were not finite, the last at step {step} "
                        f"(rows {ids}); look at these rows, or lower the learning rates"
                    )

        def score(step) -> dict[str, float]:
            scores = evaluate(eval_step, trainable, frozen, data, mesh, lambda: stop.requested)
            if scores:
                monitor.amend(scores)
                log(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            meter.pause()
            return scores

        if first == 0 and "eval" not in base:  # what training has to beat
            base = base | {"eval": score(0)}
            run.write_json(run_dir / "base.json", base)

        # The largest program first, on a copy and on padding: memory that does not suffice shows now
        if (largest := data.train.schedule.largest(first, total)) is not None:
            blank = setup.fold(data.train.blank(largest), micro_rows)
            copy = jax.tree.map(jax.numpy.copy, (trainable, opt_state))
            blank = parallel.shard_batch(blank, mesh, batch_axis=1)
            jax.block_until_ready(train_step(*copy, frozen, blank, first))
            del copy, blank
            meter.pause()

        # Loop: the metrics of a step are read while the next one computes
        stop.arm()
        scores: dict[str, float] = {}
        pending = None
        for step, _, batch in meter.fetch(data.train.iterate(first, total)):
            num_samples = data.train.schedule.num_samples(step)
            batch = parallel.shard_batch(setup.fold(batch, micro_rows), mesh, batch_axis=1)
            trainable, opt_state, metrics = train_step(trainable, opt_state, frozen, batch, step)
            if pending is not None:
                write_row(*pending)
            done, pending = step + 1, (step + 1, metrics, num_samples)
            eval_due = done == total or (config.eval_every and done % config.eval_every == 0)
            if not (eval_due or stop.requested or done % config.save_every == 0):
                continue
            write_row(*pending)
            pending = None
            scores = score(done) if eval_due and not stop.requested else {}
            states.check_frozen(frozen, base["frozen"], f"step {done}")
            checkpoints.save(done, trainable, opt_state, meta, scores.get("eval_loss"))
            monitor.plot()
            meter.pause()
            if stop.requested and (done < total or not scores):
                raise Stopped(
                    f"{stop.requested} after step {done} of {total}, which is saved; same command to go on"
                )
        if first == total:  # stopped in its last evaluation
            scores = score(total)
        compiled, buckets = train_step._cache_size(), len(data.train.schedule.buckets)
        assert compiled <= buckets, f"{compiled} compilations for {buckets} buckets"
        log(
            f"{compiled} compiled train programs for {buckets} buckets, "
            f"{eval_step._cache_size()} for evaluation"
        )

        # Only now the run is finished
        checkpoints.wait()
        monitor.plot()
        best = best_step(run_dir / "checkpoints")
        summary = {"steps": total, "best_step": best, "before": base["eval"]} | scores
        run.write_json(run_dir / "summary.json", summary)
        for name in ("eval_loss", "eval_accuracy"):
            if name in scores:
                log(f"held-out {name.removeprefix('eval_')}: {base['eval'][name]:.4f} -> {scores[name]:.4f}")
        log(
            f"The run lies in {run_dir} ({jax.device_count()} {jax.default_backend()} device(s), "
            f"{total} steps)"
        )
    return run_dir


def main(args: list[str]) -> int:
    from_user, args = take_option(args, "--config")
    show, args = take_flag(args, "--print-config")
    config, overridden = load_config(from_user or "stage1", args)
    if show:
        print(format_config(config))
        return 0
    from mmrstraj_jax.training.resilience import EXIT_STOPPED, Diverged, Stopped

    try:
        train(config, overridden)
    except Stopped as stopped:
        print(f"stopped: {stopped}")
        return EXIT_STOPPED
    except Diverged as error:
        print(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    run_command(main)
