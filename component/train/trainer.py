"""The training loop: the loss over learned tokens, exact under accumulation and on any number of ranks."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice, repeat
from operator import attrgetter

import torch
from accelerate.utils.memory import clear_device_cache
from loguru import logger
from torch.utils.data import DataLoader, Subset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.trainer_utils import TrainOutput, speed_metrics

from ..kernel.decoder import upload
from ..run.errors import NumericError, StorageError
from ..run.folder import RunFolder
from ..run.process import Interrupted, SignalWatch
from ..run.ranks import copy_from_rank_zero, known_to_all, largest_over_ranks, sum_over_ranks, total_over_ranks
from ..run.resume import FINAL
from ..settings.optimization import FOLLOWING_EVALUATIONS
from .adamw import FusedAdamW, fused_if_possible
from .checkpoint import Checkpoints, Counters
from .early_stopping import metric_of
from .health import Health
from .loss import TargetLMLoss
from .progress import LossWatch, ProgressReport
from .updates import Update, Updates, make_updates, size_of_update


class LoRATrainer(Trainer):
    """transformers' Trainer with a training loop of our own, `train`. Trainer provides the optimizer, the schedule, the
    callbacks and their order, `log`, and TrainingArguments.

    An update's loss is the sum over its learned tokens, on all ranks, divided by their number. So 4 batches of 1 weigh
    every token as 1 batch of 4 does. All ranks have the same weights, since gradients are summed over ranks once an
    update.

    Args:
        data_collator: a component.train.batch.Layout.
        folder: where checkpoints go, opened on rank 0. Without a folder nothing is saved.
        watch: the signals that have come. After an update in which one came, `train` saves and raises Interrupted.
        max_skipped_updates: how many updates that are not finite are left out before NumericError is raised.
    """

    def __init__(
        self,
        *args,
        loss: TargetLMLoss,
        folder: RunFolder | None = None,
        watch: SignalWatch | None = None,
        max_skipped_updates: int = 0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.loss, self.watch = loss, watch or SignalWatch()
        self.counters = Counters()
        self.updates: Updates | None = None  # `begin` makes them
        self.checkpoints = Checkpoints(self, folder)
        self.health = Health(self, max_skipped_updates)
        self.signal = 0  # the one that all ranks know of
        self.given = self.optimizer, self.lr_scheduler  # None if `begin` is to make them
        for shown in (ProgressCallback, PrinterCallback):
            self.remove_callback(shown)
        self.add_callback(ProgressReport(self.total_tokens, show_bar=not self.args.disable_tqdm))
        self.add_callback(LossWatch())

    def train(self, resume_from_checkpoint: str | None = None) -> TrainOutput:
        """Train the model as it is, or from a checkpoint that is whole, until `max_steps` or until a callback ends it.

        Raises:
            Interrupted: a signal came. The last update has been saved as a checkpoint.
            NumericError: a loss, gradient or weight is not finite.
            StorageError: a checkpoint could not be written.
        """
        self.begin(resume_from_checkpoint)
        while self.is_under_way():
            self.call_back("on_epoch_begin")
            for update in self.rest_of_epoch():  # 1. take: this rank's share of the samples of an update
                self.call_back("on_step_begin")
                losses = self.forward_and_backward(update)  # 2. forward and backward
                losses, norm, is_usable = self.agree(losses, update)  # 3. agree: is all finite, did a signal come
                self.step(losses, norm, is_usable)  # 4. step
                self.log_evaluate_save()  # 5. log, evaluate, save, leave
                self.leave_if_signalled()
                if self.control.should_epoch_stop or self.control.should_training_stop:
                    break
            self.end_epoch()
        return self.finish()

    def begin(self, checkpoint: str | None) -> None:
        """Make optimizer, schedule and state, and restore them from a checkpoint if one is given."""
        args = self.args
        self.accelerator.free_memory()  # what an earlier call prepared
        self.optimizer, self.lr_scheduler = self.given
        self.counters, self.checkpoints.saved_step, self.signal = Counters(), 0, 0
        if self.updates is not None:  # of an earlier call
            self.updates.give_back()
        self.updates = make_updates(self.train_dataset, self.data_collator, args)
        max_steps = self.updates.steps
        self.trained = list(self.trained_weights())  # as a walk through all modules takes milliseconds
        copy_from_rank_zero(weight.data for weight in self.trained)
        self.create_optimizer()
        # This prepares half precision alone, without DistributedDataParallel: `agree` sums the gradients.
        self.model = self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.modules = list(self.model.modules())
        if self.accelerator.scaler is not None:  # without one, accelerate's optimizer adds nothing but its own time
            self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)
        self.create_scheduler(num_training_steps=max_steps)
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        handler.train_dataloader = self.updates.loader()

        self.state = TrainerState(train_batch_size=args.train_batch_size)
        if args.process_index:  # rank 0 draws the random numbers that a single process draws
            torch.manual_seed(args.seed + args.process_index)
        if checkpoint:
            self.checkpoints.load(checkpoint)
        self.state.compute_steps(args, max_steps)
        self.state.init_training_references(self, max_steps, math.ceil(max_steps / self.updates.per_epoch), None)
        self.started, self.first_step = time.time(), self.state.global_step
        self.total_loss = -total_over_ranks(args.device, self.counters.loss)  # the checkpoint's, of earlier steps
        self.model.zero_grad()
        self.call_back("on_train_begin")
        if checkpoint:
            self.finish_step()
        elif args.eval_on_start:
            self.evaluate()
        if args.ignore_data_skip:
            self.counters.in_epoch = 0

    def finish_step(self) -> None:
        """Do what the run that wrote the checkpoint had still to do before its next update."""
        deferred, self.watch.deferred = self.watch.deferred, True
        self.log_evaluate_save()  # an evaluation that a signal cut short
        ends = self.epoch_is_over() or self.control.should_training_stop
        if (ends or self.state.global_step >= self.state.max_steps) and not self.counters.epoch_has_ended:
            self.end_epoch()
        self.watch.deferred = deferred

    def is_under_way(self) -> bool:
        """Whether another epoch begins. Callbacks may end the run, or end epochs early until none is left."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            return False
        return self.counters.epoch < self.state.num_train_epochs

    def epoch_is_over(self) -> bool:
        return self.control.should_epoch_stop or self.counters.in_epoch == self.updates.per_epoch

    def rest_of_epoch(self) -> Iterator[Update]:
        """The updates that are left in this epoch."""
        return self.updates.rest_of_epoch(self.counters.epoch, self.counters.in_epoch)

    def forward_and_backward(self, update: Update) -> list[torch.Tensor]:
        """Compute this rank's part of the gradients. With packed rows, nothing in it waits for a card.

        Returns:
            For each of its batches, a float64 scalar: what the batch adds to the update's loss.
        """
        self.watch.deferred = True  # from here on signals wait for `agree`, so that ranks leave together
        if not all(map(attrgetter("training"), self.modules)):  # in C, as there are thousands
            self.model.train()
        if self.args.torch_empty_cache_steps and self.state.global_step % self.args.torch_empty_cache_steps == 0:
            clear_device_cache()
        learned = sum(self.count_learned(part) for part in chain.from_iterable(update.batches))
        learned = sum_over_ranks(torch.full((), int(learned), device=self.args.device))
        losses = []
        for number, batch in enumerate(update.batches):
            losses.append(sum(self.backward(part, learned) for part in batch))
            if number < len(update.batches) - 1:
                self.call_back("on_substep_end")
        return losses

    def backward(self, part: dict, learned: torch.Tensor) -> torch.Tensor:
        """Add the gradients of a part to those of the parts before. Returns what it adds to the update's loss."""
        loss = self.summed_loss(self.on_device(part)) / learned
        self.accelerator.backward(loss)
        self.counters.tokens += part["attention_mask"].sum() if "attention_mask" in part else len(part["input_ids"])
        return loss.detach()

    def agree(self, losses: list[torch.Tensor], update: Update) -> tuple[list[torch.Tensor], torch.Tensor, bool]:
        """Sum the gradients over all ranks, and let ranks agree whether all is finite and whether a signal came.

        While a card is still at work on the update, the next one is fetched and the step is prepared.

        Returns:
            The losses and the gradients' norm before they are clipped, on the host, and whether the update may be used.

        Raises:
            NumericError: the update is not finite, and may not be left out.
        """
        if self.state.global_step + 1 < self.state.max_steps:  # the run's last update has none behind it
            self.updates.fetch()
        self.sum_gradients()
        norm = self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm or math.inf)
        if isinstance(self.optimizer, FusedAdamW):
            self.optimizer.prepare()
        *losses, norm = torch.stack([*losses, norm.to(self.args.device, torch.float64)]).cpu()  # waits for the card
        bad_loss, bad_norm = (not math.isfinite(value) for value in (sum(losses), norm))
        self.signal, bad_loss, bad_norm = largest_over_ranks(self.args.device, self.watch.received, bad_loss, bad_norm)
        return losses, norm, self.health.accepts(update, bad_loss, bad_norm)

    def sum_gradients(self) -> None:
        """Sum the gradients over ranks. A weight without a gradient on any rank stays without, as in one process."""
        if self.args.world_size == 1:
            return
        wanted = largest_over_ranks(self.args.device, *(weight.grad is not None for weight in self.trained))
        weights = [weight for weight, is_wanted in zip(self.trained, wanted, strict=True) if is_wanted]
        for weight in weights:
            if weight.grad is None:  # this rank's share has no sample
                weight.grad = torch.zeros_like(weight)
        sum_over_ranks(*(weight.grad for weight in weights))

    def step(self, losses: list[torch.Tensor], norm: torch.Tensor, is_usable: bool) -> None:
        """Change the weights, unless the update is left out, then advance the schedule and count the step."""
        self.call_back("on_pre_optimizer_step")
        if is_usable:
            self.optimizer.step()
            self.counters.add(losses)
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.call_back("on_optimizer_step")
        self.counters.norm, self.counters.rate = norm, self.optimizer.param_groups[0]["lr"]
        overflowed = is_usable and self.accelerator.optimizer_step_was_skipped
        if overflowed:
            scale = self.accelerator.scaler.get_scale()
            logger.info(
                f"step {self.state.global_step + 1}: a gradient was too large for float16, so no weight has changed; "
                f"the loss scale is {scale:,.0f} from here on"
            )
        elif self.args.lr_scheduler_type not in FOLLOWING_EVALUATIONS:
            self.lr_scheduler.step()
        for weight in self.trained:
            weight.grad = None
        counters, batches = self.counters, self.updates.batches
        counters.in_epoch, counters.epoch_has_ended = counters.in_epoch + 1, False
        done = min(counters.in_epoch * self.args.gradient_accumulation_steps, batches)
        self.state.global_step, self.state.epoch = self.state.global_step + 1, counters.epoch + done / batches
        self.call_back("on_step_end")

    def log_evaluate_save(self) -> None:
        """Log, evaluate and save if callbacks ask for it. transformers' DefaultFlowCallback knows the strategies."""
        if self.control.should_log and self.counters.updates:
            self.log_progress()
        if self.control.should_evaluate:
            is_best = self.note_metric(self.evaluate())
            if self.args.save_strategy == "best":
                self.control.should_save = is_best
        if self.control.should_save:
            self.counters.asked.append(self.state.global_step)
            self.checkpoints.save()
            self.call_back("on_save")

    def log_progress(self) -> None:
        """Log the mean loss since the last log line, over all ranks."""
        loss, updates = total_over_ranks(self.args.device, self.counters.loss), self.counters.updates
        self.total_loss += loss
        self.counters.begin_line()
        logs = {"loss": loss / updates, "grad_norm": self.counters.norm.item(), "learning_rate": self.counters.rate}
        if not math.isfinite(logs["grad_norm"]):  # the last update was left out
            del logs["grad_norm"]
        self.log(logs | {"num_tokens": self.total_tokens()})

    def note_metric(self, metrics: dict[str, float]) -> bool:
        """Record the best metric, and pass the metric to a schedule that follows evaluations.

        Returns:
            Whether this metric is the best so far.
        """
        value, best = metrics[metric_of(self.args)], self.state.best_metric
        if self.args.lr_scheduler_type in FOLLOWING_EVALUATIONS:
            self.lr_scheduler.step(value)
        if self.args.metric_for_best_model is None:
            return False
        if best is not None and not (value > best if self.args.greater_is_better else value < best):
            return False
        self.state.best_metric = value
        if self.args.save_strategy != "no":
            self.state.best_global_step = self.state.global_step
        return True

    def leave_if_asked(self) -> None:
        """Leave if a signal came to any rank. All ranks ask together."""
        (self.signal,) = largest_over_ranks(self.args.device, self.watch.received)
        self.leave_if_signalled()

    def leave_if_signalled(self) -> None:
        """If ranks have agreed that a signal came, write a checkpoint of this step, and raise Interrupted."""
        if self.signal:
            self.checkpoints.save()
            self.call_back("on_save")
            self.checkpoints.tell_how_to_go_on()
            raise Interrupted(self.signal)

    def end_epoch(self) -> None:
        self.call_back("on_epoch_end")
        self.counters.epoch_has_ended = True
        if self.epoch_is_over():  # and not merely the run
            self.counters.epoch, self.counters.in_epoch = self.counters.epoch + 1, 0
        self.log_evaluate_save()
        self.leave_if_signalled()

    def finish(self) -> TrainOutput:
        """Log the figures of the whole run, and load the best adapter if load_best_model_at_end asks for it."""
        self.total_loss += total_over_ranks(self.args.device, self.counters.loss)
        steps = self.state.global_step - self.first_step
        loss = self.total_loss / max(steps, 1)
        metrics = speed_metrics("train", self.started, steps * size_of_update(self.args), steps) | {"train_loss": loss}
        self.log(metrics)
        if self.args.load_best_model_at_end:
            self.leave_if_asked()
            self.checkpoints.load_best()
        self.call_back("on_train_end")
        return TrainOutput(self.state.global_step, loss, metrics)

    def save_final(self) -> str:
        """Publish adapter and tokenizer as FINAL, which marks the run as done. Returns the path."""
        self.checkpoints.write_final()
        self.leave_if_asked()
        return self.checkpoints.publish(FINAL)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Compute the loss per learned token over `eval_dataset`. Each row counts once, on any number of ranks."""
        dataset, batch = self.eval_dataset if eval_dataset is None else eval_dataset, self.args.eval_batch_size
        own = Subset(dataset, range(self.args.process_index, len(dataset), self.args.world_size))
        # A generator of its own, so that an evaluation does not change the run's random numbers.
        batches = DataLoader(own, batch, collate_fn=self.data_collator.lay_out, generator=torch.Generator())
        rounds = math.ceil(len(dataset) / (batch * self.args.world_size))  # on the rank with the most rows
        self.model.eval()
        deferred, self.watch.deferred = self.watch.deferred, True
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for parts in islice(chain(batches, repeat([])), rounds):
                for part in parts:
                    totals[0] += self.summed_loss(self.on_device(part))
                    totals[1] += int(self.count_learned(part))
                self.leave_if_asked()  # the run that goes on evaluates anew
        self.watch.deferred = deferred
        totals = sum_over_ranks(totals)
        loss = (totals[0] / totals[1]).item()
        if not math.isfinite(loss):
            raise known_to_all(
                NumericError(
                    f"step {self.state.global_step}: the loss over eval_file is not finite; look at its rows "
                    "(script/inspect_data.py), and at the base model's weights"
                )
            )
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.call_back("on_evaluate", metrics)
        return metrics

    def summed_loss(self, part: dict) -> torch.Tensor:
        """Sum the losses of a part's learned tokens. For a packed row, the model's forward does so (PackedForward)."""
        if "targets" in part:
            return self.model(**part)
        logits = self.model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
        return self.loss(logits, part["input_ids"], part["target_mask"])

    def count_learned(self, part: dict) -> torch.Tensor | int:
        """Learned tokens of a padded batch or a packed row."""
        return len(part["targets"]) if "targets" in part else self.loss.count_learned(part["target_mask"]).sum()

    def on_device(self, part: dict) -> dict:
        """A part with its tensors on the device, which are copied while the host goes on."""
        device = self.args.device
        return {key: upload(value, device) if isinstance(value, torch.Tensor) else value for key, value in part.items()}

    def trained_weights(self) -> Iterator[torch.nn.Parameter]:
        return (weight for weight in self.model.parameters() if weight.requires_grad)

    def total_tokens(self) -> int:
        """Tokens of all ranks' samples so far. Unlearned tokens count, padding does not."""
        return total_over_ranks(self.args.device, self.counters.tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        with faults_of_trackers():
            super().log(logs, start_time)

    def call_back(self, event: str, *facts) -> None:
        with faults_of_trackers():
            self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control, *facts)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None) -> tuple[type, dict]:
        """The optimizer that Trainer chooses, fused where it can be."""
        optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        weights = [weight for weight in model.parameters() if weight.requires_grad] if model else []
        return fused_if_possible(optimizer, settings, weights), settings

    def get_train_dataloader(self) -> DataLoader:
        """A loader of the samples of this rank's share of each update; of its rows, for a stream."""
        return make_updates(self.train_dataset, self.data_collator, self.args).loader()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write adapter and tokenizer as safetensors and JSON, on rank 0. The arguments are not pickled."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.model.save_pretrained(folder, save_embedding_layers=False)
            self.processing_class.save_pretrained(folder)


@contextmanager
def faults_of_trackers() -> Iterator[None]:
    """Raise StorageError if a callback cannot write, as one of `report_to` does when the disk is full."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"a tracker could not write ({error}); make room, or set report_to to none") from error
