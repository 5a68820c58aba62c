"""Train a causal language model on a prepared dataset.

examples:
  python scripts/train.py --config configs/quickstart/train.yaml
  accelerate launch scripts/train.py --config configs/quickstart/train.yaml
  python scripts/train.py --config configs/quickstart/train.yaml optimizer.learning_rate=1e-3 --resume never

Run it again after a crash, a kill or Ctrl-C: it goes on from the newest whole checkpoint and ends in the same weights.
Exit code 0 when done, 75 when told to stop (SIGTERM, SIGINT, SIGUSR1) and saved, 2 for a mistake in the configuration.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codex_accel import (
    callbacks, cli, compiler, identity, manifest, offline, optim, plugins, preemption, run_folder, seeds, starts,
    tracking,
)  # fmt: skip
from codex_accel.events import event
from codex_accel.train_schema import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage, alone in its run folder and listening to signals; returns the exit code."""
    config = compiler.resolve(starts.resolve(cli.parse(TrainConfig, argv, doc=__doc__, stage="train")))
    offline.enforce(allow_network=config.allow_network)
    run_dir = Path(config.output_dir)
    if identity.is_complete(config, run_dir):
        if cli.is_main_process():
            print(f"{run_dir} is complete. Choose another output_dir for a new run.")
        return 0
    with preemption.Listener() as listener:
        if config.dry_run or not cli.is_main_process():
            listener.start_up(None)
            return train(config, run_dir, listener)
        manifest.require(Path(config.data.dataset), kinds=["dataset"], verify=False, key="data.dataset")
        run_folder.make(run_dir)
        with run_folder.held(run_dir):
            listener.start_up(run_dir)
            return train(config, run_dir, listener)


def train(config: TrainConfig, run_dir: Path, listener: preemption.Listener) -> int:
    """Train until the end of the run, or until the listener is told to stop; returns the exit code."""
    # === names: everything in the config that can be checked before a heavy import ===================================
    training, dataset_dir = config.training, Path(config.data.dataset)
    dataset_manifest = manifest.require(dataset_dir, kinds=["dataset"], verify=config.verify, key="data.dataset")
    start_dir = starts.find(config)
    called = callbacks.load(config)
    optim.require(config)
    tracking.require(config)

    # === run: processes, precision, the logs =========================================================================
    import torch
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin as Accumulation

    from codex_accel import (
        checkpoint, evaluation, forecast, loss, packing, probes, processes, progress, run, schedule, telemetry,
        throughput,
    )  # fmt: skip
    from codex_accel import model as models
    from codex_accel import tokenizer as tokenizers
    from codex_accel.tokens import TokenStore

    accumulation_steps = run.accumulation_steps(config)
    processes.require_installed_engine()
    window = Accumulation(num_steps=accumulation_steps, sync_with_dataloader=False, adjust_scheduler=False)
    accelerator = Accelerator(
        cpu=run.on_cpu(config),  # else two processes without a GPU would not find each other
        mixed_precision=training.mixed_precision,
        dynamo_backend="no",  # it would wrap the model, whose weights would have other names: see `compiler`
        gradient_accumulation_plugin=window,
    )
    processes.fit_engine(accelerator, config)
    run.set_kernels(config, accelerator)
    main_process, device, num_processes = accelerator.is_main_process, accelerator.device, accelerator.num_processes
    writes = main_process and not config.dry_run
    metrics, events = run.open_logs(config, run_dir, enabled=writes)

    # === data: blocks to train on, windows to evaluate on ============================================================
    tokenizer_dir = run.tokenizer_folder(dataset_dir, dataset_manifest, verify=config.verify)
    tokenizer = tokenizers.load(tokenizer_dir)
    if start_dir is not None:
        run.require_fitting_tokenizer(start_dir, dataset_dir, key="data.dataset")
    blocks = packing.build(config, TokenStore(dataset_dir, config.data.train_split))
    max_steps, steps_per_epoch = run.length(config, num_blocks=len(blocks))
    lr_schedule = schedule.build(config.schedule, max_steps=max_steps, steps_per_epoch=steps_per_epoch)
    validation_sets = evaluation.validation_sets(config)

    # === model: weights and optimizer, prepared for the engine =======================================================
    model = models.build(config, tokenizer, start=start_dir, device=device)
    probes.require_causal(model, config)
    plan = blocks.facts()
    if config.data.isolate_documents and plan["blocks_with_boundary"]:
        probes.require_isolation(model, config, blocks.with_boundary())
    loss_plan = probes.loss_chunks(model, config, mixed_precision=accelerator.mixed_precision)
    parents = run.parents(dataset_dir, tokenizer_dir, start_dir)
    who = identity.of(config, dataset_manifest, parents, model, mixed_precision=accelerator.mixed_precision)
    identity.require_known_drift(config, who)
    optimizer = optim.build(config, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare_model = accelerator.unwrap_model(model)
    checkpoint.register_hooks(accelerator)
    speed = throughput.Meter(bare_model, accelerator, block_size=config.data.block_size)
    facts = {
        **models.count_parameters(bare_model),
        "max_steps": max_steps,
        "steps_per_epoch": steps_per_epoch,
        "accumulation_steps": accumulation_steps,
        "num_processes": num_processes,
        "engine": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "device": str(device),
        "schedule": dataclasses.asdict(lr_schedule),
        "blocks": plan,
        "loss": loss_plan,
    }
    if main_process:
        run.print_start(config, facts)

    # === resume: from the newest whole checkpoint, decided by the main process =======================================
    state = checkpoint.TrainerState()
    chosen = None
    if config.dry_run:  # a few steps of the same loop, of which nothing is written
        called = forecast.watch(config, accelerator, bare_model, optimizer)
    else:
        chosen = processes.from_main(accelerator, lambda: run.find_start(config, run_dir, events))
    if chosen is not None:
        state, saved_identity = checkpoint.stored_state(chosen)
        identity.require_same(chosen, saved_identity, who, allowed=config.allow_drift)  # before weights that do not fit
        checkpoint.load(accelerator, chosen, options=config.optimizer.options)
        parents = [*parents, *run.branch_parents(chosen, run_dir)]
        if not run_folder.is_own(chosen, run_dir):
            state.metrics_bytes, state.end_reason = 0, ""  # of the other run
    if not config.dry_run:
        processes.from_main(accelerator, lambda: run.cut_back(config, metrics, events, state))
    if writes:
        (run_dir / preemption.MARKER).unlink(missing_ok=True)
        run.record(config, run_dir, {**facts, "parents": parents, "plugins": plugins.used(config)})
        kind, place = ("resume", str(chosen)) if chosen else ("start", None)
        event(events, kind, f"step {state.step} of {max_steps}", checkpoint=place)
        print(f"{kind:<7} {f'{place}, ' if place else ''}step {state.step}", flush=True)

    # === loop: every step is a function of its number =================================================================
    def write_line(split: str, **values: float | int | None) -> None:
        metrics.write({"step": state.step, "split": split, **values})
        track({"step": state.step, "split": split, **values})

    def call(name: str, **values: Any) -> None:
        now = callbacks.Moment(name, state, values, config, bare_model, tokenizer, events, steps_per_epoch, elapsed_s())
        state.end_reason = callbacks.call(called, now, accelerator)

    def save() -> None:
        nonlocal saved_step
        if config.dry_run:
            return
        state.elapsed_s = elapsed_s()
        try:
            checkpoint.save(
                accelerator,
                run_dir,
                state,
                model=bare_model,
                config=config,
                log=metrics,
                tokenizer_folder=tokenizer_dir,
                parents=parents,
                identity=who,
            )
        except checkpoint.SaveFailed as error:
            run.on_failed_save(config, events, error)
            return
        saved_step = state.step
        event(events, "save", f"step {state.step}")
        if main_process:
            run.prune(config, run_dir, events)
        call("on_save", checkpoint=str(run_folder.checkpoint_path(run_dir, state.step)))

    def listen(done: int, total: int) -> None:
        show(state.step, f"evaluation {done}/{total}")
        if processes.any_process(accelerator, told_to_stop()):
            raise preemption.Preempted

    def evaluate() -> None:
        evaluated_model = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
        lines = []
        for held_out in validation_sets:
            scores = evaluation.score(
                evaluated_model,
                held_out.store,
                held_out.windows,
                batch_size=config.evaluation.batch_size,
                device=device,
                process_index=accelerator.process_index,
                num_processes=num_processes,
                between_batches=listen,
            )
            scores = processes.sum_over_processes(accelerator, scores)
            lines.append((held_out.split, evaluation.summarize(scores, num_bytes=held_out.num_bytes)))
        for split, values in lines:  # only now: a signal in between leaves no half evaluation in the log
            write_line(split, **values)
        state.evaluated_step = state.step
        for split, values in lines:
            call("on_evaluate", split=split, **values)

    def at_last_step() -> bool:
        return not config.dry_run and training.stop_at_step is not None and state.step >= training.stop_at_step

    def told_to_stop() -> bool:
        return listener.told_to_stop() or at_last_step()

    def elapsed_s() -> float:
        return elapsed_before_s + time.monotonic() - started

    elapsed_before_s = state.elapsed_s
    num_micro_batches, parameters = training.global_batch_size // training.micro_batch_size, list(model.parameters())
    sum_of_losses = loss.of(bare_model, config, chunk_rows=loss_plan["chunk_rows"])
    max_grad_norm = training.max_grad_norm if training.max_grad_norm is not None else math.inf
    saved_step = state.step if chosen else -1
    out_of_time = training.max_time_s is not None and elapsed_before_s >= training.max_time_s
    try:
        with (
            tracking.started(config, accelerator, run_dir, events, step=state.step) as track,
            progress.bar("train", total=max_steps, done=state.step, unit="steps") as show,
            telemetry.sampling(config, run_dir, track, step=lambda: state.step, enabled=writes),
        ):
            started = speed.start()  # trackers may take seconds to begin
            if processes.any_process(accelerator, told_to_stop()):
                raise preemption.Preempted
            while True:
                # evaluation comes before the step and after the save, so a run that resumes here makes it again
                last = state.step >= max_steps or out_of_time or bool(state.end_reason)
                due = config.evaluation.every_steps is not None and state.step % config.evaluation.every_steps == 0
                if (last or (due and state.step > 0)) and state.evaluated_step < state.step and not config.dry_run:
                    evaluate()
                if state.end_reason and saved_step < state.step:  # by that evaluation, at a step without a checkpoint
                    save()
                if last or state.end_reason:
                    break

                # one window: the micro-batches of this process, out of a batch that all processes share
                indices = blocks.of_step(
                    state.step, global_batch_size=training.global_batch_size, seed=config.seed
                ).reshape(num_micro_batches, training.micro_batch_size)
                mine = range(accelerator.process_index, num_micro_batches, num_processes)
                micro_batches = [(number, blocks.batch(indices[number])) for number in mine]
                speed.add(sum(batch.input_ids.size for _, batch in micro_batches))
                num_targets = processes.sum_int(accelerator, sum(batch.num_targets for _, batch in micro_batches))
                # backward divides by the accumulation count and DDP by the processes: both are undone here
                scale = accumulation_steps * num_processes / max(1, num_targets)
                learning_rate = config.optimizer.learning_rate * lr_schedule.scale_at(state.step)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * group["rate_scale"]

                model.train()
                loss_sum = torch.zeros((), device=device)
                for number, batch in micro_batches:
                    torch.manual_seed(seeds.derive(config.seed, "dropout", state.step, number))
                    with accelerator.accumulate(model):
                        inputs = run.to_device(batch, device)
                        micro_loss = sum_of_losses(model, **inputs, use_cache=False)
                        accelerator.backward(micro_loss * scale)
                        loss_sum += micro_loss.detach()
                grad_norm = float(accelerator.clip_grad_norm_(parameters, max_grad_norm))
                bad_loss = processes.any_process(accelerator, not math.isfinite(float(loss_sum)))
                # with a scaler an infinite norm is an overflow: it skips the step itself and halves its scale
                finite = not bad_loss and (math.isfinite(grad_norm) or accelerator.scaler is not None)
                if finite:
                    optimizer.step()
                else:
                    run.on_nonfinite(config, events, step=state.step, grad_norm=grad_norm, saved_step=saved_step)
                    processes.pass_over_gradient(accelerator)
                optimizer.zero_grad()
                state.num_skipped += not (finite and math.isfinite(grad_norm))
                state.num_target_tokens += num_targets
                state.step += 1

                # a line of metrics; the loss is this step's, over all processes
                late = training.max_time_s is not None and elapsed_s() >= training.max_time_s
                out_of_time = processes.any_process(accelerator, late)
                values = {"learning_rate": learning_rate, "grad_norm": grad_norm}
                if state.step % config.log.every_steps == 0 or state.step == max_steps or out_of_time:
                    step_loss = processes.sum_float(accelerator, loss_sum) / max(1, num_targets)
                    counts = {"epoch": state.step / steps_per_epoch, "num_target_tokens": state.num_target_tokens}
                    values = {"loss": step_loss, **values, **counts, **speed.rates(), "elapsed_s": elapsed_s()}
                    write_line("train", **values)
                    show(state.step, progress.note(values, device))
                call("on_step", **values)

                # save, stop
                stop = processes.any_process(accelerator, told_to_stop())
                due = config.checkpoint.every_steps is not None and state.step % config.checkpoint.every_steps == 0
                if due or stop or out_of_time or state.end_reason or state.step == max_steps:
                    save()
                if stop:
                    raise preemption.Preempted
        if config.dry_run:
            forecast.show(config, facts, called, accelerator)
            processes.end(accelerator)
            return 0
    except preemption.Preempted:
        if state.step > max(saved_step, 0):
            save()
        if writes:
            reason = listener.reason or ("training.stop_at_step" if at_last_step() else "another process")
            preemption.write_marker(run_dir, step=max(saved_step, 0), reason=reason)
            event(events, "preempted", f"step {state.step}", reason=reason)
            print(f"stopped at step {state.step} of {max_steps}. {run.stands(saved_step)} {run.how_to_go_on(reason)}")
        processes.end(accelerator)
        return preemption.EXIT_CODE
    except (RuntimeError, MemoryError) as error:
        run.on_error(config, error, step=state.step, saved_step=saved_step)
    finally:
        processes.settle(accelerator)

    # === finish: a plain folder for everybody else ====================================================================
    call("on_end")
    weights = accelerator.get_state_dict(model)
    if main_process:
        metrics.sync()
        run.prune(config, run_dir, events)  # the last evaluation is known now; once `final` stands nothing runs again
        digest = checkpoint.save_final(
            run_dir,
            model=bare_model,
            weights=weights,
            config=config,
            tokenizer_folder=tokenizer_dir,
            parents=parents,
            facts={"step": state.step, **models.count_parameters(bare_model)},
        )
        event(events, "end", f"step {state.step}", reason=state.end_reason, manifest_digest=digest)
        events.sync()
        run.print_end(run_dir, state, digest)
    processes.end(accelerator)
    return 0


if __name__ == "__main__":
    cli.run(main)
