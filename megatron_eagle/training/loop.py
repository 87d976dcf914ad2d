"""Trains one stage of a recipe: the whole life of a training process, from an empty world to the last checkpoint.

The same function runs in two processes on a laptop and in hundreds on a cluster. Starting it again after any kind of
death continues the stage from its newest whole checkpoint with the losses it would have had; starting it again after
the stage is complete does nothing.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.best import Best, forget_best_after
from megatron_eagle.checkpoint.files import Description, find_latest, read_description, require_same_model
from megatron_eagle.checkpoint.saver import SaveFailed, Saver
from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.ending import is_over
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.data.sample.tokenizer import recipe_tokenizer, tokenizer_files
from megatron_eagle.data.stream.streams import Stream
from megatron_eagle.errors import Damaged, Superseded, UserError
from megatron_eagle.parallel.agreement import naming_a_loss, on_rank_zero
from megatron_eagle.parallel.groups import Groups, destroy, initialise, join
from megatron_eagle.training.engine import Engine
from megatron_eagle.training.evaluating import Evaluation, MakeEvaluator, Scored, Scores
from megatron_eagle.training.fencing import OwnStart
from megatron_eagle.training.log import StepRecord, TrainingLog, open_log
from megatron_eagle.training.non_finite import NonFinite, describe, explain
from megatron_eagle.training.opening import newest, open_stage, opening_line
from megatron_eagle.training.origin import origin, write_recipe
from megatron_eagle.training.resume_rules import changes, recipe_values, require_continuable
from megatron_eagle.training.run_events import append_event
from megatron_eagle.training.run_folder import RunFolder
from megatron_eagle.training.start_up import StartUp
from megatron_eagle.training.start_up import describe as describe_start
from megatron_eagle.training.step import COMPUTING, Step, StepResult, packs_per_replica
from megatron_eagle.training.step_stats import StepStats, gather_rejected, peak_rss_bytes
from megatron_eagle.training.stragglers import StragglerWatch
from megatron_eagle.training.throughput import utilisation
from megatron_eagle.training.watchdog import StoppedEarly, Watchdog


def train_stage(
    recipe: Recipe,
    stage_name: str,
    run_folder: RunFolder,
    platform: Platform,
    watch: Watchdog | None = None,
    *,
    fallback: bool = False,
    start: int | None = None,
    make_evaluator: MakeEvaluator | None = None,
) -> None:
    """Train ``stage_name`` to its last step, or on from its newest checkpoint; every process of the run calls this.

    fallback: pass over checkpoints whose files are damaged; without it a damaged newest one is an error.
    start: number of this start of the run (``training.fencing``), if whoever started the processes has taken one.
    make_evaluator: makes what evaluates a stage whose recipe wants it, while it trains.

    Raises StoppedEarly, after saving, if ``watch`` was told to stop before the last step; Superseded, without, if a
    newer start of the run is at work; NonFinite if a loss or a gradient is no number.
    """
    start_up, stage = StartUp(), recipe.stage(stage_name)
    start_up.reached("imports")
    timeout = timedelta(minutes=recipe.collective_timeout_minutes)
    join(platform, timeout=timeout)
    start_up.reached("meeting")
    groups = initialise(recipe.stage_layout(stage), platform, timeout=timeout)
    start_up.reached("groups")
    try:
        options: dict[str, Any] = {"fallback": fallback, "start": start, "make_evaluator": make_evaluator}
        options["start_up"] = start_up
        run = StageRun(recipe, stage, run_folder, platform, groups, watch or Watchdog(), **options)
        run.train()
    finally:
        destroy()


class StageRun:
    """One process's view of a stage while it trains."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        run_folder: RunFolder,
        platform: Platform,
        groups: Groups,
        watch: Watchdog | None = None,
        *,
        fallback: bool = False,
        start: int | None = None,
        make_evaluator: MakeEvaluator | None = None,
        start_up: StartUp | None = None,
    ) -> None:
        if stage.evaluation and make_evaluator is None:
            raise ValueError(f"stage '{stage.name}' is evaluated while it trains, nobody said how")
        self.make_evaluator = make_evaluator
        self.evaluation: Evaluation | None = None
        self.scored = Scored()  # so far, also where this start's recipe has no evaluation
        self.recipe, self.stage, self.platform, self.groups = recipe, stage, platform, groups
        self.run_folder = run_folder
        self.watch = watch or Watchdog()
        self.start_up = start_up or StartUp()
        self.fallback = fallback
        self.own_start = OwnStart(run_folder.path, start)
        self.packs_per_replica = packs_per_replica(stage, groups.dp_size)
        self.rejected_total = 0
        self.peak_rss_bytes = 0  # of the processes that trained earlier steps of this stage
        self.step = 0
        self.tokenizer_files: dict[str, bytes] = {}  # on rank 0, which puts them into checkpoints
        self.base: str | None = None  # digest of what adapters belong to
        self.origin: dict[str, Any] = {}  # on rank 0, for the start's file and the dashboards

    def train(self) -> None:
        """Everything between joining the run and leaving it, as the newest start of the run.

        Raises UserError, on every process, if a trainer is known to be at work in the run's folder.
        """
        try:
            self.own_start.number = on_rank_zero(lambda: self.own_start.join(self._is_needed))
            self._train_or_continue()
        except Damaged as damaged:  # on every process: by ``on_rank_zero`` or ``checksums.verify``, nowhere else
            folder = Path(damaged.folder)
            way_on = on_rank_zero(lambda: self.run_folder.way_on(folder, self.recipe, self.stage))
            raise UserError(f"{damaged.what}. {way_on}") from None
        finally:
            self.own_start.leave()

    def _train_or_continue(self) -> None:
        stage_folder = self.run_folder.stage_checkpoints(self.stage.name)
        own = on_rank_zero(lambda: newest(stage_folder, fallback=self.fallback, say=self._say))
        if own:
            require_same_model(own.path, own.description, self.recipe.model.eagle())
            if self._completes(own.description):
                self._say(f"{self.stage.name} is complete: {own.description.step} steps, {own.path}")
                self._say_changes(own.description, "was trained otherwise than the recipe says now")
                return
            require_continuable(own.path, own.description, self.recipe, self.stage)
            self.step, self.rejected_total = own.description.step, own.description.rejected_total
            self.peak_rss_bytes = own.description.peak_rss_bytes
            self.scored = Scored(own.description.best_score, own.description.waited, own.description.best_by)
        on_rank_zero(self._read_tokenizer)  # before anything is built
        self.evaluation = self._open_evaluation()
        reached = self.start_up.reached
        reached("checkpoints")
        opened = open_stage(self.recipe, self.stage, self.run_folder, own, self.platform, self.groups, reached)
        self.base = opened.base
        if own:
            self._say_changes(own.description, "resumed with changes")
        on_rank_zero(self._explain_start)
        device = self.platform.device
        self._say(opening_line(self.recipe, self.stage, opened, step=self.step, groups=self.groups, device=device))
        self._train(opened.engine, opened.stream, stage_folder)

    def _is_needed(self) -> bool:
        return self.fallback or not self._is_complete()

    def _explain_start(self) -> None:
        write_recipe(self.run_folder.path, self.recipe)
        self.origin = origin(
            self.recipe,
            self.stage,
            step=self.step,
            processes=self.groups.world_size,
            device=self.platform.device,
        )
        self.own_start.describe(self.origin)

    def _read_tokenizer(self) -> None:
        """Refuses one that does not fit the model; its files are for the checkpoints."""
        recipe_tokenizer(self.recipe)
        self.tokenizer_files = tokenizer_files(self.recipe.tokenizer)

    def _is_complete(self) -> bool:
        latest = find_latest(self.run_folder.stage_checkpoints(self.stage.name))
        return latest is not None and self._completes(read_description(latest))

    def _completes(self, description: Description) -> bool:
        """More steps than the recipe has are no end of it: they are refused later."""
        own = self.stage
        return description.step <= own.steps and is_over(description.step, own.steps, description.waited, own.patience)

    @property
    def _out_of_patience(self) -> bool:
        return self.evaluation is not None and self.evaluation.out_of_patience

    def _say_changes(self, saved: Description, what: str) -> None:
        if not saved.recipe:
            self._say(f"{self.stage.name}: step {saved.step} was saved without its recipe, changes cannot be compared")
        elif found := changes(saved, self.recipe, self.stage):
            self._say(f"{self.stage.name} {what}: {', '.join(found)}")

    def _open_evaluation(self) -> Evaluation | None:
        settings = self.stage.evaluation
        if settings is None or self.make_evaluator is None:
            return None
        run, goes_on = self.run_folder.path, self.watch.goes_on
        evaluate = self.make_evaluator(self.recipe, self.stage, self.groups, self.platform, run, goes_on)
        if self.scored.by not in (None, settings.by):
            self._say(
                f"{self.stage.name}: the best score so far, {self.scored.best:.4f}, is {self.scored.by}; the recipe "
                f"goes by {settings.by}, the best begins anew"
            )
            self.scored = Scored()
        return Evaluation(settings, self.stage.steps, evaluate, self.scored)

    def _train(self, engine: Engine, stream: Stream | None, stage_folder: Path) -> None:
        on_rank_zero(self.own_start.require_newest)  # the log's file is written anew
        on_rank_zero(lambda: forget_best_after(stage_folder, self.step))  # later steps will be trained again
        log, step = self._open_log(), Step(engine, self.groups, self.stage, self.platform.device)
        read = (lambda: [next(stream) for _ in range(self.packs_per_replica)]) if stream else list
        self.saver = Saver(
            stage_folder,
            self.groups,
            self.platform.device,
            keep=self.stage.keep_checkpoints,
            tokenizer=self.tokenizer_files,
            say=self._say,
            start=self.own_start.number,
            may_publish=self.own_start.require_newest,
        )
        self.stragglers = StragglerWatch(self.groups, self.platform.device)
        self.watch.training_begins()
        try:
            while self.step < self.stage.steps and not self._out_of_patience:
                stop = self._one_step(step, read, log, lambda leaving: self._save_if_due(engine, stream, leaving))
                if "first step" not in self.start_up.parts:
                    self._say_start_up()
                if stop and self.step < self.stage.steps and not self._out_of_patience:
                    raise StoppedEarly(f"{self.stage.name} was asked to stop: saved step {self.step}")
        finally:
            if log:
                log.close()
            if stream:
                stream.close()

    def _save_if_due(self, engine: Engine, stream: Stream | None, leaving: bool) -> None:
        """Save beside training every so many steps; before leaving, the checkpoint must be there."""
        due = leaving or self.step % self.stage.checkpoint_every == 0
        if not due and not self.saver.pending:
            return
        with self.watch.saving(), self._doing("saving a checkpoint"):
            if leaving:
                with suppress(SaveFailed):  # the next one is what matters now
                    self.saver.finish()
            if due:
                self.saver.start(self._description(engine), engine.state(), stream.state() if stream else None)
            else:
                self.saver.after_step()
            if leaving or not self.stage.async_save:
                self.saver.finish(must=leaving)

    def _one_step(
        self,
        step: Step,
        read: Callable[[], list[PackedBatch]],
        log: TrainingLog | None,
        save: Callable[[bool], None],
    ) -> bool:
        """Take a step, evaluate it if that is due, log it on rank 0 and save it; whether any process was asked to stop.

        The last step is saved before it is evaluated, which may take long. One before it is evaluated first, so that a
        run that dies meanwhile evaluates it again; if the run was asked to stop, there is no time for that.
        """
        started = time.perf_counter()
        result = step.run(partial(self.stragglers.reading, read), phase=self._phase)
        with self._doing("collecting the step's numbers"):
            stats = step.collect(result, stop=self.watch.asked, superseded=bool(self.own_start.superseded_by))
            rejected = gather_rejected(result.batches, self.groups) if stats.rejected else []
        if stats.superseded:
            raise Superseded(self.own_start.superseded_by or "a newer start of the run is at work")
        self.step += 1
        self.rejected_total += stats.rejected
        if not (math.isfinite(stats.loss) and math.isfinite(result.grad_norm)):  # the same on every process
            raise NonFinite(self._explain_non_finite(step, result, stats.loss))
        seconds = time.perf_counter() - started
        self.watch.step_done()
        self._name_stragglers(seconds)
        last = self.step == self.stage.steps
        saved_first = last and self.evaluation is not None
        if saved_first:
            save(True)
        scores = self._evaluate(step.engine, skip=stats.stop and not last)
        if log and self.own_start.is_newest(self._say_of_stage):
            log.step(self._record(step.engine, result, stats, rejected, seconds, scores))
        if not saved_first:
            save(stats.stop or last or self._out_of_patience)
        return stats.stop

    def _evaluate(self, engine: Engine, *, skip: bool) -> Scores:
        """Of the step just made, if it is due."""
        if self.evaluation is None or not self.evaluation.due(self.step):
            return Scores({})
        if skip:
            self._say(f"{self.stage.name}: step {self.step} is not evaluated, the run was asked to stop")
            return Scores({})
        with self.watch.saving(), self._doing("evaluating"):
            scores = self.evaluation.run(engine)
            if self.evaluation.settings.keep == "best":
                self.saver.score(Best(self.step, self.evaluation.score_of(scores), self.evaluation.settings.by))
        if self._out_of_patience and self.step < self.stage.steps:
            self._say(
                f"{self.stage.name} ends at step {self.step} of {self.stage.steps}: none of the last "
                f"{self.scored.waited} evaluations scored above {self.scored.best:.4f}"
            )
        return scores

    def _explain_non_finite(self, step: Step, result: StepResult, loss: float) -> str:
        with self._doing("looking for what is not finite"):
            self.saver.finish()
            found = explain(step.engine, step.normalise(result.batches), self.groups)
        where = f"{self.stage.name} step {self.step}"
        samples = [identity for batch in result.batches for identity in batch.sample_ids]
        last_good = find_latest(self.run_folder.stage_checkpoints(self.stage.name))
        return describe(where, loss, result.grad_norm, found, samples, last_good)

    def _doing(self, operation: str) -> AbstractContextManager[None]:
        """Say what was being done if another process is lost in the middle of it."""
        return naming_a_loss(f"in {self.stage.name}, step {self.step + 1}, {operation}")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        timed = self.stragglers.timing(name) if name == COMPUTING else nullcontext()
        with self._doing(name), timed:
            yield

    def _name_stragglers(self, seconds: float) -> None:
        """In the log and in the run's events, which ``status`` and the next start read."""
        with self._doing("comparing the processes' speeds"):
            found = self.stragglers.after_step(self.step, seconds)
        for change in found:
            self._say(f"{self.stage.name} step {self.step}: {change}")
            self._note("straggler", **change.values())

    def _say_start_up(self) -> None:
        self.start_up.reached("first step")
        slowest = self.start_up.slowest(self.platform.device)
        self._say(f"{self.stage.name}: {describe_start(slowest)}")
        parts = {part: round(seconds, 3) for part, seconds in slowest.items()}
        self._note("start_up", processes=self.groups.world_size, seconds=parts)

    def _note(self, event: str, **values: Any) -> None:
        """Into the run's events, on rank 0; a disk that will not take it is no reason to end a run."""
        if self.groups.rank == 0:
            try:
                append_event(self.run_folder.path, event, stage=self.stage.name, step=self.step, **values)
            except OSError as error:
                self._say(f"{self.stage.name}: cannot note it: {error}")

    def _record(
        self,
        engine: Engine,
        result: StepResult,
        stats: StepStats,
        rejected: list[tuple[str, str]],
        seconds: float,
        scores: Scores,
    ) -> StepRecord:
        return StepRecord(
            stage=self.stage.name,
            step=self.step,
            steps=self.stage.steps,
            loss=stats.loss,
            learning_rate=engine.learning_rate,
            grad_norm=result.grad_norm,
            useful_tokens=stats.useful_tokens,
            tokens=self.stage.batch * self.stage.pack_length,
            tiles=stats.tiles,
            tile_balance=stats.tile_balance,
            seconds=seconds,
            **utilisation(stats.flops, seconds, self.groups.world_size, self.platform.device),
            data_wait=result.data_wait,
            checkpoint_stall_s=self.saver.take_stall(),
            sample_digest=stats.sample_digest,
            rejected_total=self.rejected_total,
            rejected=rejected,
            scores=dict(scores.by_name),
            evaluation_s=scores.seconds,
            stragglers=self.stragglers.known,
        )

    def _description(self, engine: Engine) -> Description:
        return Description(
            stage=self.stage.name,
            step=self.step,
            steps=self.stage.steps,
            model=asdict(self.recipe.model.eagle()),
            layout=asdict(self.recipe.stage_layout(self.stage)),
            data_parallel_size=self.groups.dp_size,
            trainable_parameters=engine.trainable_parameters,
            rejected_total=self.rejected_total,
            peak_rss_bytes=max(self.peak_rss_bytes, peak_rss_bytes(self.platform.device)),
            recipe=recipe_values(self.recipe, self.stage),
            best_score=self.scored.best,
            waited=self.scored.waited,
            best_by=self.scored.by,
            base=self.base,
            lora=asdict(self.recipe.lora) if self.recipe.lora else {},
        )

    def _open_log(self) -> TrainingLog | None:
        if self.groups.rank != 0:
            return None
        return open_log(self.run_folder.path, self.stage, self.recipe.log, resumed_at=self.step, about=self.origin)

    def _say_of_stage(self, line: str) -> None:
        self._say(f"{self.stage.name}: {line}")

    def _say(self, line: str) -> None:
        if self.groups.rank == 0:
            print(line, flush=True)
