"""The training loop: runs with Accelerate on any number of processes, and resumes exactly where it stopped."""

from __future__ import annotations

import math
import os
import signal
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed

from . import checkpoint
from .batches import split_batch
from .distributed import DataShare, check_launch, disable_sharded_loading
from .model import new_scheduler, trained_parameters
from .outputs import how_to_resume
from .progress import Progress
from .recipe import RecipeError
from .streams import StreamBatches

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from .objective import TrainingObjective
    from .recipe import Recipe
    from .reports import MetricsLog

EvaluationCallback: TypeAlias = Callable[[int, dict[str, float]], None]
"""Called by the main process after every evaluation, with the step and the metrics of the validation rows."""


class TrainingInterrupted(Exception):
    """Training stopped on a signal after writing a checkpoint; the message says how to resume."""

    def __init__(self, message: str, signal_number: int | None) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.signal_number)


class TrainingDiverged(Exception):
    """The loss is not finite; the message suggests remedies."""


def new_accelerator(recipe: Recipe) -> Accelerator:
    """Create the accelerator of a run; other settings come from `accelerate launch` and its configuration files.

    Raises:
        RecipeError: if a tracker is not installed (Accelerate may ignore that silently), or see
            `distributed.check_launch`.
    """
    trackers = [str(each) for each in get_available_trackers()]
    for name in recipe.report_to:
        if name not in trackers:
            raise RecipeError(
                f"`report_to`: the tracker {name!r} is unknown to Accelerate or not installed; there are {trackers}."
            )
    # PyTorch deprecates the argument, but Accelerate has no other name for it.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    parts = recipe.gradient_accumulation_steps
    accelerator = Accelerator(
        # Always set: otherwise an earlier Accelerator of this process decides silently.
        mixed_precision=recipe.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        # A plugin, because an environment variable overrides a plain number. By default Accelerate also makes a step
        # at the end of a data loader. The loop has none, but that of a Trainer in this process may be at its end.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=parts, sync_with_dataloader=False),
        log_with=recipe.report_to or None,
        project_config=ProjectConfiguration(recipe.output_dir, logging_dir=f"{recipe.output_dir}/logs"),
        # All buffers belong to the frozen backbone and do not change.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    check_launch(accelerator, recipe)
    disable_sharded_loading(accelerator)
    return accelerator


@contextmanager
def training_accelerator(recipe: Recipe) -> Iterator[Accelerator]:
    """Yield the accelerator of a run, and end its trackers and process group afterwards.

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
            # Private API: the only way to use another precision in the next run of this process.
            AcceleratorState._reset_state()


class Loop:
    """Trains a model on an objective.

    Args:
        recipe: the recipe; for several tasks, the settings that they share.
        objective: the batches, loss and metrics.
        model: the model; exactly its trained parameters require gradients.
        accelerator: the accelerator.
        checkpoints: the folder for checkpoints.
        log: the record of losses and metrics.
        command: the subcommand of `prefix-adapter` that resumes the run, for messages.
        quiet: whether to show no progress.
        on_evaluation: called by the main process after every evaluation, with the step and the metrics of the
            validation rows; an exception that it raises ends the run.

    Raises:
        RecipeError: if the schedule does not exist.
    """

    def __init__(
        self,
        recipe: Recipe,
        objective: TrainingObjective,
        model: nn.Module,
        accelerator: Accelerator,
        checkpoints: Path,
        log: MetricsLog,
        command: str,
        quiet: bool = False,
        on_evaluation: EvaluationCallback | None = None,
    ) -> None:
        self.recipe, self.objective, self.accelerator, self.log = recipe, objective, accelerator, log
        self.command, self.on_evaluation, self.checkpoints = command, on_evaluation, checkpoints
        self._share = DataShare.of(accelerator)
        self.batches = objective.batches
        epoch = self.batches.steps_per_epoch  # `None` for a stream, whose recipe has `max_steps`
        self.steps = recipe.max_steps or 0 if epoch is None else math.ceil(recipe.num_train_epochs * epoch)
        self.steps = min(self.steps, recipe.max_steps or self.steps)
        self.eval_steps = recipe.eval_steps or epoch or max(self.steps // 10, 1)
        self.model, self.optimizer, optimizer = objective.prepare(model)
        self.parameters = list(trained_parameters(self.model).values())
        if not self.parameters:  # the run only evaluates
            self.steps = 0
        self.scheduler = new_scheduler(recipe, optimizer, self.steps, epoch or self.steps)
        self.state: dict[str, Any] = {"best_step": None, "best_metrics": None, "evaluations_since_best": 0}
        self.step, self._loss_sum, self._loss_count = 0, 0.0, 0
        self._pending: Tensor | None = None
        self._pending_step, self._pending_rates = 0, self._rates()
        self._signal: int | None = None
        self._shown = accelerator.is_main_process and not quiet
        self._progress: Progress | None = None

    def unwrapped_model(self) -> Any:
        """The model without Accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def resume(self) -> None:
        """Load the last intact checkpoint, if there are checkpoints.

        The schedule follows this run's recipe: if the recipe has more steps than the recipe of the checkpoint, the
        learning rates from here on are those of a run of the new length.

        Raises:
            CheckpointError: if there are checkpoints, but none is intact.
            RecipeError: if the checkpoint has more steps than this run.
        """
        metric = self.objective.metric
        step = checkpoint.find_intact(self.checkpoints, self.accelerator, self.unwrapped_model(), metric)
        if step is None:
            return
        if step > self.steps:
            raise RecipeError(
                f"`num_train_epochs`, `max_steps`: the run in {self.recipe.output_dir} has been trained for {step} "
                f"steps, and these values allow {self.steps}. A run can be made longer, not shorter."
            )
        folder = checkpoint.step_folder(self.checkpoints, step)
        state = checkpoint.restore(folder, self.accelerator, self.model, self.optimizer)
        self.step = step
        self.state = {key: state[key] for key in self.state}
        self._loss_sum, self._loss_count = state["loss_sum"], state["loss_count"]
        self._set_schedule(state["scheduler"]["last_epoch"])
        if isinstance(self.batches, StreamBatches):
            self.batches.load_state(state["stream"])
        self._remove_old_checkpoints()
        self.accelerator.print(f"Resuming after step {self.step} of {self.steps}.{self._how_to_train_longer()}")

    def _set_schedule(self, count: int) -> None:
        """Set the schedule, and the learning rates, to the state after `count` of its steps."""
        factors = [factor(count) for factor in self.scheduler.lr_lambdas]
        rates = [rate * factor for rate, factor in zip(self.scheduler.base_lrs, factors, strict=True)]
        done = {"last_epoch": count, "_step_count": count + 1, "_last_lr": rates}
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **done})
        for group, rate in zip(self.optimizer.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _how_to_train_longer(self) -> str:
        """For a finished run, a sentence with the settings that make it longer; otherwise an empty text."""
        if self.step == self.steps:
            return " The run is finished. With a larger `num_train_epochs` or `max_steps` it trains longer."
        if self._patience_is_over():
            return " The run has stopped early. With a larger `early_stopping_patience` it trains longer."
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
            set_seed(recipe.seed + self._share.number)  # Other rows have another dropout.
        self.model.train()
        previous = self._catch_signals()
        self._progress = progress = Progress(self.steps, self.step, self._shown)
        try:
            if not self.steps:
                self._evaluate()
            while self.step < self.steps and not self._patience_is_over():
                rates = self._rates()
                loss = self._train_step(self.batches[self.step])
                self.step += 1
                stop = self._read_pending()
                copies = self.accelerator.num_processes // self._share.parts
                flags = torch.stack([loss / copies, torch.full_like(loss, self._signal is not None)])
                # Read in the next step, so that the CPU does not wait for the device now.
                self._pending = self.accelerator.reduce(flags)
                self._pending_step, self._pending_rates = self.step, rates
                last = self.step == self.steps
                evaluate_now = last or self.step % self.eval_steps == 0
                save_now = evaluate_now or bool(recipe.save_steps and self.step % recipe.save_steps == 0)
                if save_now or stop:
                    stop = self._read_pending() or stop
                progress.show_step()
                if evaluate_now:
                    stop = self._evaluate() or stop
                if save_now or stop:
                    self._save()
                if stop and not last and not self._patience_is_over():
                    raise TrainingInterrupted(
                        f"Stopped after step {self.step} of {self.steps}; the checkpoint is in {self.checkpoints}. "
                        f"{how_to_resume(recipe.output_dir, self.command)}",
                        self._signal,
                    )
        finally:
            progress.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _train_step(self, batch: list[int]) -> Tensor:
        """Take one optimizer step; return this process's share of the batch's mean loss."""
        accelerator, parts = self.accelerator, self.recipe.gradient_accumulation_steps
        items = self.objective.items
        total = sum(items[i] for i in batch)
        sum_of_losses = torch.zeros((), device=accelerator.device)
        for features in split_batch(batch, parts, *self._share):
            with accelerator.accumulate(self.model):
                loss = self.objective.loss(self.model, features)
                # `loss` is the mean over the items of `features`. Accelerate divides it by `parts` and averages the
                # gradients over the processes. With this weight the result is the gradient of the mean over the
                # whole batch, however the batch is split.
                weight = sum(items[i] for i in features) / total
                accelerator.backward(loss * (weight * parts * self._share.parts))
                if accelerator.sync_gradients and self.recipe.max_grad_norm:
                    accelerator.clip_grad_norm_(self.parameters, self.recipe.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            sum_of_losses += loss.detach() * weight
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        return sum_of_losses

    def _read_pending(self) -> bool:
        """Read the loss of the last step; return whether a process received a signal."""
        if self._pending is None:
            return False
        (loss, stop), self._pending = self._pending.tolist(), None
        if not math.isfinite(loss):
            raise self._diverged(f"the loss became {loss}")
        self._loss_sum, self._loss_count = self._loss_sum + loss, self._loss_count + 1
        if self._loss_count >= self.recipe.logging_steps:
            mean = self._loss_sum / self._loss_count
            self.write("train", {"loss": mean, **self._pending_rates}, self._pending_step)
            if self._progress is not None:
                self._progress.show_loss(mean, self._pending_rates)
            self._loss_sum, self._loss_count = 0.0, 0
        return stop > 0

    def _diverged(self, what: str) -> TrainingDiverged:
        saved = checkpoint.saved_steps(self.checkpoints)
        kept = f"The checkpoint of step {saved[-1]} is intact. " if saved else ""
        rates = ", ".join(f"{rate:g}" for rate in self._rates().values())
        return TrainingDiverged(
            f"By step {self.step} {what}. {kept}Try a lower `learning_rate` or `head_learning_rate` (they were "
            f"{rates}), a longer warm-up (`warmup_ratio`), or `mixed_precision: bf16` or `no` instead of fp16."
        )

    def _rates(self) -> dict[str, float]:
        groups = self.optimizer.optimizer.param_groups
        return {f"learning_rate/{group['name']}": group["lr"] for group in groups}

    def write(self, split: str, values: dict[str, float], step: int | None = None) -> None:
        """Record values of a step, by default of the current one."""
        step = self.step if step is None else step
        self.log.write(step, self.batches.epochs(step), split, values)

    def _evaluate(self) -> bool:
        """Evaluate on the validation rows; return whether to stop early."""
        metrics = self.objective.evaluate(self.unwrapped_model())
        if not math.isfinite(metrics["loss"]):
            raise self._diverged(f"the loss of the validation rows became {metrics['loss']}")
        self.write("validation", metrics)
        is_best = self._is_better(metrics, self.state["best_metrics"])
        if self._progress is not None:
            self._progress.show_evaluation(self.step, metrics, self.objective.metric, is_best)
        if is_best:
            self.state |= {"best_step": self.step, "best_metrics": metrics, "evaluations_since_best": 0}
        else:
            self.state["evaluations_since_best"] += 1
        if self.on_evaluation and self.accelerator.is_main_process:
            self.on_evaluation(self.step, metrics)
        return self._patience_is_over()

    def _is_better(self, metrics: dict[str, float], best: dict[str, float] | None) -> bool:
        if best is None:
            return True
        new, old = metrics[self.objective.metric], best[self.objective.metric]
        return new < old if self.objective.lower_is_better else new > old

    def _patience_is_over(self) -> bool:
        patience = self.recipe.early_stopping_patience
        return patience is not None and self.state["evaluations_since_best"] >= patience

    def _save(self) -> None:
        state = {
            **self.state,
            "loss_sum": self._loss_sum,
            "loss_count": self._loss_count,
            "scheduler": self.scheduler.state_dict(),
        }
        if isinstance(self.batches, StreamBatches):
            state["stream"] = self.batches.state()
        try:
            checkpoint.save(self.checkpoints, self.step, self.accelerator, self.model, self.optimizer, state)
        except FloatingPointError as error:
            raise self._diverged(str(error)) from error
        self._remove_old_checkpoints()
        self.accelerator.wait_for_everyone()

    def _remove_old_checkpoints(self) -> None:
        if self.accelerator.is_main_process:
            checkpoint.remove_others(self.checkpoints, {self.step, self.state["best_step"]})

    def _catch_signals(self) -> dict[int, Any]:
        """Only record the first SIGINT or SIGTERM; a second one has its usual effect. Return the previous handlers."""
        previous: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return previous

        def record(number: int, frame: Any) -> None:
            self._signal = number
            # Under torchrun keep the handler: torchrun forwards a signal that the processes may already have received.
            if not torch.distributed.is_torchelastic_launched():
                signal.signal(number, previous[number])

        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.getsignal(number)
            signal.signal(number, record)
        return previous
