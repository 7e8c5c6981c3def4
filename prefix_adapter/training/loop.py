"""The training loop: Accelerate's, for any number of processes, that can stop anywhere and go on exactly there."""

from __future__ import annotations

import math
import os
import signal
import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from tqdm.auto import tqdm

from ..training import checkpoint
from .batches import shares
from .distributed import check, load_whole
from .model import new_scheduler, trained
from .outputs import how_to_resume
from .recipe import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from .lesson import Lesson
    from .multitask import JointLesson
    from .outputs import Log
    from .recipe import Recipe


class TrainingInterrupted(Exception):
    """Training was asked to stop, and did so after writing a checkpoint; the message says how to go on."""

    def __init__(self, message: str, signal_number: int | None) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.signal_number)


class TrainingDiverged(Exception):
    """The loss is not finite; the message says what to try."""


def new_accelerator(recipe: Recipe) -> Accelerator:
    """The accelerator of a run; `accelerate launch` and its configuration files decide the rest.

    Raises:
        RecipeError: see `distributed.check`; or if a tracker is not there, which Accelerate may not mention.
    """
    trackers = [str(each) for each in get_available_trackers()]
    for name in recipe.report_to:
        if name not in trackers:
            raise RecipeError(
                f"`report_to`: Accelerate knows no {name!r}, or it is not installed; there are {trackers}."
            )
    # By torch; Accelerate knows no other word for it.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    parts = recipe.gradient_accumulation_steps
    accelerator = Accelerator(
        # Said in any case: else it would be, without a word, that of an earlier Accelerator of this process.
        mixed_precision=recipe.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        # As a plain number an environment variable would go before it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=parts),
        log_with=recipe.report_to or None,
        project_config=ProjectConfiguration(recipe.output_dir, logging_dir=f"{recipe.output_dir}/logs"),
        # Buffers are the frozen backbone's and do not change.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    check(accelerator, recipe)
    load_whole(accelerator)
    return accelerator


@contextmanager
def accelerating(recipe: Recipe) -> Iterator[Accelerator]:
    """The accelerator of a run, which ends with it.

    Raises:
        RecipeError: see `new_accelerator`.
    """
    first = not AcceleratorState._shared_state
    accelerator = new_accelerator(recipe)
    try:
        yield accelerator
    finally:
        accelerator.end_training()
        if first and accelerator.num_processes == 1:
            # Private, and the only way to let the next run of this process have another precision.
            AcceleratorState._reset_state()


class Loop:
    """One training run.

    Args:
        recipe: the recipe.
        lesson: what is learnt, from which rows.
        model: the model, with what is trained requiring gradients.
        accelerator: the accelerator.
        checkpoints: the folder for checkpoints.
        log: where metrics are recorded.
        on_evaluation: called by the main process after every evaluation, with the step and the validation rows'
            metrics; what it raises ends the run.

    Raises:
        RecipeError: if there is no such schedule.
    """

    def __init__(
        self,
        recipe: Recipe,
        lesson: Lesson | JointLesson,
        model: nn.Module,
        accelerator: Accelerator,
        checkpoints: Path,
        log: Log,
        on_evaluation: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.recipe, self.lesson, self.accelerator, self.log = recipe, lesson, accelerator, log
        self.on_evaluation, self.checkpoints = on_evaluation, checkpoints
        self.batches, self.metric = lesson.batches, lesson.metric
        self.steps = math.ceil(recipe.num_train_epochs * self.batches.steps_per_epoch)
        self.steps = min(self.steps, recipe.max_steps or self.steps)
        self.eval_steps = recipe.eval_steps or self.batches.steps_per_epoch
        self.model, self.optimizer, optimizer = lesson.prepare(model)
        self.scheduler = new_scheduler(recipe, optimizer, self.steps, self.batches.steps_per_epoch)
        self.parameters = list(trained(self.model).values())
        self.state: dict[str, Any] = {"best_step": None, "best_metrics": None, "evaluations_since_best": 0}
        self.step, self._sum, self._count = 0, 0.0, 0
        self._pending: Tensor | None = None
        self._pending_step, self._pending_rates = 0, self._rates()
        self._signal: int | None = None

    def try_out(self) -> None:
        """Meet now what would else end the run in its middle.

        Raises:
            RecipeError: if the longest row is too long for the model, or there is no such metric.
        """
        self.lesson.try_out(self.accelerator.unwrap_model(self.model))

    def resume(self) -> bool:
        """Go back to the last whole checkpoint; `False` if there is none.

        The schedule is that of this run's recipe: where the recipe has more steps than the one that the checkpoint was
        written with, the rates from here on are those that a run of that length has.

        Raises:
            CheckpointError: if there are checkpoints, and none that is whole.
            RecipeError: if the checkpoint is behind the last step of this run.
        """
        model = self.accelerator.unwrap_model(self.model)
        step = checkpoint.choose(self.checkpoints, self.accelerator, model, self.metric)
        if step is None:
            return False
        if step > self.steps:
            raise RecipeError(
                f"`num_train_epochs`, `max_steps`: the run in {self.recipe.output_dir} has been trained for {step} "
                f"steps, and with these it would have {self.steps}. It can be made longer, not shorter."
            )
        folder = checkpoint.folder_of(self.checkpoints, step)
        state = checkpoint.restore(folder, self.accelerator, self.model, self.optimizer)
        self.step = step
        self.state = {key: state[key] for key in self.state}
        self._sum, self._count = state["loss_sum"], state["loss_count"]
        self._set_schedule(state["scheduler"]["last_epoch"])
        self._keep()
        self.accelerator.print(f"Resuming after step {self.step} of {self.steps}.{self._why_done()}")
        return True

    def _set_schedule(self, count: int) -> None:
        """Go on with the schedule after so many of its steps."""
        factors = [factor(count) for factor in self.scheduler.lr_lambdas]
        rates = [rate * factor for rate, factor in zip(self.scheduler.base_lrs, factors, strict=True)]
        done = {"last_epoch": count, "_step_count": count + 1, "_last_lr": rates}
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **done})
        for group, rate in zip(self.optimizer.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _why_done(self) -> str:
        """What to say of a run that has nothing left to train."""
        if self.step == self.steps:
            return " With a larger `num_train_epochs` or `max_steps` it would be trained longer."
        if self._patience_is_over():
            return " It had stopped early; with a larger `early_stopping_patience` it would be trained longer."
        return ""

    def run(self) -> None:
        """Train to the end.

        Raises:
            TrainingInterrupted: on SIGINT or SIGTERM, after a checkpoint was written.
            TrainingDiverged: if the loss is not finite.
            OSError: if a checkpoint cannot be written.
        """
        recipe = self.recipe
        if self.step == 0:
            set_seed(recipe.seed + self.accelerator.process_index)  # dropout differs from process to process
        self.model.train()
        previous = self._catch_signals()
        bar = tqdm(total=self.steps, initial=self.step, desc="Training", disable=not self._main)
        try:
            while self.step < self.steps and not self._patience_is_over():
                rates = self._rates()
                loss = self._train_step(self.batches[self.step])
                self.step += 1
                stop = self._read()
                flags = torch.stack([loss, torch.full_like(loss, self._signal is not None)])
                # Read in the next step only, so that this one need not be waited for.
                self._pending, self._pending_step, self._pending_rates = (
                    self.accelerator.reduce(flags),
                    self.step,
                    rates,
                )
                last = self.step == self.steps
                evaluate_now = last or self.step % self.eval_steps == 0
                save_now = evaluate_now or bool(recipe.save_steps and self.step % recipe.save_steps == 0)
                if save_now or stop:
                    stop = self._read() or stop
                bar.update()
                if evaluate_now:
                    stop = self._evaluate() or stop
                if save_now or stop:
                    self._save()
                if stop and not last and not self._patience_is_over():
                    raise TrainingInterrupted(
                        f"Stopped after step {self.step} of {self.steps}; the checkpoint is in {self.checkpoints}. "
                        f"{how_to_resume(recipe.output_dir, self.lesson.command)}",
                        self._signal,
                    )
        finally:
            bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    @property
    def _main(self) -> bool:
        return self.accelerator.is_main_process

    def _train_step(self, batch: list[int]) -> Tensor:
        """One optimizer step; returns this process's share of the batch's mean loss."""
        accelerator, parts = self.accelerator, self.recipe.gradient_accumulation_steps
        items = self.lesson.items
        total = sum(items[i] for i in batch)
        sum_of_losses = torch.zeros((), device=accelerator.device)
        for share in shares(batch, parts, accelerator.process_index, accelerator.num_processes):
            with accelerator.accumulate(self.model):
                loss = self.lesson.loss(self.model, share)
                # The model gives the mean over its own items. Accelerate divides by the parts, and the processes'
                # gradients are averaged: so weighed, their sum is that of the mean over the whole batch, however it
                # is shared out.
                weight = sum(items[i] for i in share) / total
                accelerator.backward(loss * (weight * parts * accelerator.num_processes))
                if accelerator.sync_gradients and self.recipe.max_grad_norm:
                    accelerator.clip_grad_norm_(self.parameters, self.recipe.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            sum_of_losses += loss.detach() * weight
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        return sum_of_losses

    def _read(self) -> bool:
        """Read what is pending of the last step; whether some process was asked to stop."""
        if self._pending is None:
            return False
        (loss, stop), self._pending = self._pending.tolist(), None
        if not math.isfinite(loss):
            raise self._diverged(f"the loss became {loss}")
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count >= self.recipe.logging_steps:
            self._write(self._pending_step, "train", {"loss": self._sum / self._count, **self._pending_rates})
            self._sum, self._count = 0.0, 0
        return stop > 0

    def _diverged(self, what: str) -> TrainingDiverged:
        found = checkpoint.find(self.checkpoints)
        kept = f"The checkpoint of step {found[-1]} was written before. " if found else ""
        rates = ", ".join(f"{rate:g}" for rate in self._rates().values())
        return TrainingDiverged(
            f"By step {self.step} {what}. {kept}Try a lower `learning_rate` or `head_learning_rate` (they were "
            f"{rates}), a longer warm-up (`warmup_ratio`), or `mixed_precision: bf16` or `no` in place of fp16."
        )

    def _rates(self) -> dict[str, float]:
        groups = self.optimizer.optimizer.param_groups
        return {f"learning_rate/{group['name']}": group["lr"] for group in groups}

    def _write(self, step: int, split: str, values: dict[str, float]) -> None:
        self.log.write(step, step / self.batches.steps_per_epoch, split, values)

    def _evaluate(self) -> bool:
        """Measure on the validation rows; whether to stop early."""
        metrics = self.lesson.measure(self.accelerator.unwrap_model(self.model))
        if not math.isfinite(metrics["loss"]):
            raise self._diverged(f"the loss of the validation rows became {metrics['loss']}")
        self._write(self.step, "validation", metrics)
        if self.lesson.is_better(metrics, self.state["best_metrics"]):
            self.state |= {"best_step": self.step, "best_metrics": metrics, "evaluations_since_best": 0}
        else:
            self.state["evaluations_since_best"] += 1
        if self.on_evaluation and self._main:
            self.on_evaluation(self.step, metrics)
        return self._patience_is_over()

    def _patience_is_over(self) -> bool:
        patience = self.recipe.early_stopping_patience
        return patience is not None and self.state["evaluations_since_best"] >= patience

    def _save(self) -> None:
        state = {
            **self.state,
            "loss_sum": self._sum,
            "loss_count": self._count,
            "scheduler": self.scheduler.state_dict(),
        }
        try:
            checkpoint.save(self.checkpoints, self.step, self.accelerator, self.model, self.optimizer, state)
        except FloatingPointError as error:
            raise self._diverged(str(error)) from error
        self._keep()
        self.accelerator.wait_for_everyone()

    def _keep(self) -> None:
        if self._main:
            checkpoint.keep(self.checkpoints, {self.step, self.state["best_step"]})

    def _catch_signals(self) -> dict[int, Any]:
        """From now on the first SIGINT or SIGTERM is only noted; a second one has its usual effect."""
        previous: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return previous

        def note(number: int, frame: Any) -> None:
            self._signal = number
            # torchrun passes a signal on to processes that may have got it already, and kills them in the end.
            if not torch.distributed.is_torchelastic_launched():
                signal.signal(number, previous[number])

        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.getsignal(number)
            signal.signal(number, note)
        return previous
