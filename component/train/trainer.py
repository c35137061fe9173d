"""Trainer for an adapter: the loss over learned tokens, exact under accumulation and ranks; checkpoints that are whole
or absent; a stop at signals, at figures that are not finite, and at a full disk, on all ranks at once."""

import json
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from loguru import logger
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..kernel.memory import optimizer_bytes
from ..run.errors import NumericError, StorageError
from ..run.folder import RunFolder
from ..run.log import quiet_transformers
from ..run.manifest import Damaged, verify
from ..run.process import Interrupted, SignalWatch, outlive_signals
from ..run.ranks import gather, known_to_all, on_every_rank, on_rank_zero
from ..run.resume import FINAL, find_checkpoints
from .batch import Sample, SampleBatch, spread
from .loss import TargetLMLoss
from .progress import LossWatch, ProgressReport
from .sampler import LengthGroupedSampler, set_epoch

SHOWN_ROWS = 20  # of an update that has to be named
HYPERPARAMETERS = ("initial_lr", "weight_decay", "betas", "eps", "momentum", "alpha")  # of an optimizer's groups
OVERFLOWS = 20  # float16 updates in a row that may overflow: its loss scale halves at each


class LoRATrainer(Trainer):
    """transformers' Trainer over what component.train.batch makes: padded batches, or packed rows of whole updates.

    An update's loss is the sum over its learned tokens, of all accumulated batches and ranks, divided by their number,
    so that 4 batches of 1 weigh every token as 1 batch of 4 does.

    Args:
        folder: where checkpoints go, on rank 0 opened; without one there are none.
        watch: of signals; `train` leaves by Interrupted after the update in which one came, and a checkpoint.
        max_skipped_updates: updates that are not finite and may be left out before NumericError is raised.
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
        # As compute_loss_func, the loss is not scaled a second time for accumulation.
        super().__init__(*args, compute_loss_func=loss, **kwargs)
        self.loss = loss
        self.folder, self.watch, self.max_skipped_updates = folder, watch or SignalWatch(), max_skipped_updates
        self.tokens_seen = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self.signal = 0  # that all ranks know of
        self.saved_step = self.checked_step = self.skipped = self.overflows = 0
        for shown in (ProgressCallback, PrinterCallback):
            self.remove_callback(shown)
        report = ProgressReport(self.total_tokens, show_bar=not self.args.disable_tqdm)
        for callback in (report, LossWatch(), Continuation(self)):
            self.add_callback(callback)

    def get_train_dataloader(self) -> DataLoader:
        loader = self.stream() if isinstance(self.train_dataset, IterableDataset) else super().get_train_dataloader()
        loader.generator = torch.Generator()  # an iterator draws a seed; the run's random numbers stay out of it
        if loader.num_workers:
            loader.worker_init_fn = partial(start_worker, loader.worker_init_fn)
        return loader

    def stream(self) -> DataLoader:
        """Batches of this rank's rows: in libraries' hands, every rank would read and render those of all."""
        self.train_dataset.rank, self.train_dataset.ranks = self.args.process_index, self.args.world_size
        return DataLoader(
            self.train_dataset,
            self.args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
            multiprocessing_context=getattr(self.args, "dataloader_multiprocessing_context", None),
        )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The batches of an update, and its learned tokens. Packed rows, made of all its samples, are the last one."""
        batches: list = []
        if isinstance(self.train_dataset, IterableDataset):  # whose rows may be bad, on one rank alone
            on_every_rank(lambda: batches.extend(islice(epoch_iterator, num_batches)))
        else:
            batches.extend(islice(epoch_iterator, num_batches))
        if batches and isinstance(batches[0], SampleBatch):
            samples = self.own_samples([sample for batch in batches for sample in batch.samples])
            self.update = [SampleBatch(samples)]
            batches = [[] for _ in batches[1:]] + [self.data_collator.lay_out(samples)]
        else:
            self.update = batches
            batches = [[batch] for batch in batches]
        self.update_loss = torch.zeros((), dtype=torch.float64, device=device)
        self.loss_before = self._tr_loss.clone()
        num_items = self._get_num_items_in_batch(batches, device)
        # Until all ranks have met here, also while they pass over the samples seen before, a signal leaves at once.
        self.watch.deferred = True
        return batches, num_items

    def own_samples(self, samples: list[Sample]) -> list[Sample]:
        """This rank's part of an update's samples, of all ranks', with about as many tokens as every other's: ranks
        wait for the slowest."""
        if self.args.world_size == 1:
            return samples
        everyones = list(chain.from_iterable(gather(samples)))
        lengths = [len(sample["input_ids"]) for sample in everyones]
        places = spread(lengths, sum(lengths), self.args.world_size)[self.args.process_index]
        return [everyones[place] for place in sorted(places)]

    def _get_num_items_in_batch(self, batch_samples: list[list[dict]], device: torch.device) -> torch.Tensor:
        """Learned tokens of one update, over all its batches and all ranks."""
        count = sum(self.count_learned(part) for parts in batch_samples for part in parts)
        return self.accelerator.reduce(torch.as_tensor(count, device=device), "sum")

    def count_learned(self, part: dict) -> torch.Tensor | int:
        """Learned tokens of a padded batch or a packed row."""
        return len(part["targets"]) if "targets" in part else self.loss.count_learned(part["target_mask"]).sum()

    def summed_loss(self, model, part: dict) -> torch.Tensor:
        """Over the learned tokens of a padded batch or a packed row, whose forward computes it (PackedForward)."""
        if "targets" in part:
            return model(**part)
        logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
        return self.loss(logits, part["input_ids"], part["target_mask"])

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        # Ranks average their gradients; the sum is wanted.
        return self.summed_loss(model, inputs) / num_items_in_batch * self.accelerator.num_processes

    def training_step(self, model, inputs: list[dict], num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward of a padded batch, or of an update's packed rows; ranks meet in the last one."""
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for part in inputs:
            with nullcontext() if part is inputs[-1] else self.accelerator.no_sync(model):
                total += super().training_step(model, part, num_items_in_batch)
            seen = part["attention_mask"].sum() if "attention_mask" in part else len(part["input_ids"])
            self.tokens_seen += seen if isinstance(seen, int) else seen.to(self.tokens_seen.device)
        self.update_loss += total
        return total

    def _get_grad_norm(self, model, grad_norm=None):
        """Called when the gradients of an update are complete, before they are used."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        finite = [
            torch.isfinite(torch.as_tensor(value, device=self.args.device)) for value in (self.update_loss, grad_norm)
        ]
        self.signal, bad_loss, bad_gradient = self.agree(self.watch.received, *(~value for value in finite))
        overflowed = bad_gradient and not bad_loss and self.accelerator.scaler is not None
        self.overflows = self.overflows + 1 if overflowed else 0
        if bad_loss or self.overflows > OVERFLOWS or (bad_gradient and not overflowed):
            self.refuse_update("loss" if bad_loss else "gradient")
        return grad_norm

    def agree(self, *values: int | torch.Tensor) -> list[int]:
        """The largest of each value over all ranks."""
        facts = torch.stack([torch.as_tensor(value, dtype=torch.int64, device=self.args.device) for value in values])
        if dist.is_initialized():
            dist.all_reduce(facts, dist.ReduceOp.MAX)
        return facts.tolist()

    def refuse_update(self, what: str) -> None:
        """Leave the update out, or raise NumericError where none may be; its rows are named on rank 0."""
        step = self.state.global_step + 1
        rows = "\n  ".join(chain.from_iterable(gather(self.suspects())))
        message = f"step {step}: the {what} is not finite. Rows of this update:\n  {rows}"
        self.skipped += 1
        if self.skipped > self.max_skipped_updates:
            whole = f"checkpoint-{self.saved_step} is as it was" if self.saved_step else "there is no checkpoint yet"
            raise known_to_all(
                NumericError(
                    f"{message}\nNothing of it was used; {whole}. Look at these rows (script/inspect_data.py); "
                    "set max_skipped_updates to leave such updates out, or begin anew with a lower learning_rate"
                )
            )
        logger.warning(f"{message}\nleft out, {self.skipped} of max_skipped_updates={self.max_skipped_updates}")
        self.accelerator.gradient_state._set_sync_gradients(False)  # the optimizer's step now does nothing
        self._tr_loss.copy_(self.loss_before)
        self._globalstep_last_logged += 1  # its loss is in no mean
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()

    @torch.no_grad()
    def suspects(self) -> list[str]:
        """`file:line` of the update's samples whose loss is not finite; of all its samples where none or all are so."""
        samples = list(chain.from_iterable(map(self.unbatch, self.update)))
        self.model.eval()
        bad = [not torch.isfinite(self.loss_of(sample)) for sample in samples]
        self.model.train()
        named = samples if all(bad) or not any(bad) else [s for s, is_bad in zip(samples, bad, strict=True) if is_bad]
        names = [place_of(self.train_dataset, sample["input_ids"]) for sample in named[:SHOWN_ROWS]]
        return [*names, f"and {len(named) - SHOWN_ROWS} more"] if len(named) > SHOWN_ROWS else names

    def unbatch(self, batch: SampleBatch | dict[str, torch.Tensor]) -> list[Sample]:
        if isinstance(batch, SampleBatch):
            return batch.samples
        lengths = batch["attention_mask"].sum(1).tolist()
        return [{key: batch[key][row, :length].tolist() for key in batch} for row, length in enumerate(lengths)]

    def loss_of(self, sample: Sample) -> torch.Tensor:
        batch = self.data_collator([sample])
        part = self.data_collator.lay_out(batch.samples)[0] if isinstance(batch, SampleBatch) else batch
        return self.summed_loss(self.model, self._prepare_inputs(part))

    def floating_point_ops(self, inputs: list[dict]) -> int:
        return 0  # the estimate is of no use to us, and knows no rows

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(self.train_dataset, "lengths"):
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler(self.train_dataset.lengths, batch, seed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("grad_norm", 0)):  # of an update that was left out
            del logs["grad_norm"]
        if "loss" in logs:
            logs["num_tokens"] = self.total_tokens()
        super().log(logs, start_time)

    def total_tokens(self) -> int:
        """That all ranks have gone through."""
        return self.accelerator.reduce(self.tokens_seen.clone(), "sum").item()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss per learned token over the whole of `eval_dataset`, each row counted once on any number of ranks."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        own = Subset(dataset, range(self.args.process_index, len(dataset), self.args.world_size))
        # Its own generator: the state of the random numbers is the same whether a run evaluates or not.
        batches = DataLoader(own, self.args.eval_batch_size, collate_fn=self.data_collator, generator=torch.Generator())
        rounds = -(-len(dataset) // (self.args.eval_batch_size * self.args.world_size))  # of the rank with most rows
        self.model.eval()
        deferred, self.watch.deferred = self.watch.deferred, True
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch in islice(chain(batches, repeat(None)), rounds):
                parts = (
                    self.data_collator.lay_out(batch.samples)
                    if isinstance(batch, SampleBatch)
                    else filter(None, [batch])
                )
                for part in map(self._prepare_inputs, parts):
                    totals += torch.stack(
                        (self.summed_loss(self.model, part), torch.as_tensor(self.count_learned(part)).to(totals))
                    )
                self.leave_if_asked()  # the resumed run evaluates (Continuation)
        self.watch.deferred = deferred
        totals = self.accelerator.reduce(totals, "sum")
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
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        with quiet_transformers():  # it looks for the best checkpoint where the folder was
            begun = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
            )
        self.state.compute_steps(self.args, max_steps)  # as they are set now, not as the checkpoint has them
        if resume_from_checkpoint:
            saved = json.loads(Path(resume_from_checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
            if best := saved["best_model_checkpoint"]:
                self.check_best(str(self.folder.path / Path(best).name))
        self.state.best_model_checkpoint = self.best_checkpoint()
        self.args.eval_on_start = self.args.eval_on_start and not self.state.global_step
        self.resumed_from, self.saved_step = resume_from_checkpoint, self.state.global_step
        return begun

    def scores(self) -> dict[str, float]:
        """Scores of the evaluated steps, by the name of the checkpoint that the step has if it was saved."""
        key = "eval_" + (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        return {f"checkpoint-{entry['step']}": entry[key] for entry in self.state.log_history if key in entry}

    def best_checkpoint(self, written: str = "") -> str | None:
        """Path of the saved checkpoint with the best score; the one about to be `written` counts as saved."""

        def choose() -> str | None:
            known = {written, *(path.name for path in find_checkpoints(self.folder.path))}
            scores = {name: score for name, score in self.scores().items() if name in known}
            pick = max if self.args.greater_is_better else min
            return str(self.folder.path / pick(scores, key=scores.get)) if scores else None

        return on_rank_zero(choose) if self.folder and self.args.metric_for_best_model else None

    def check_best(self, path: str | None) -> None:
        """Raise StorageError if the model of this checkpoint is to be the final one, and it is not whole."""

        def check() -> None:
            try:
                verify(Path(path), Path(path).name)
            except Damaged as damage:
                raise StorageError(
                    f"{path} has the best model, and {damage}; put it back, or go on without it by "
                    "load_best_model_at_end=false and resume_despite_changes=true"
                ) from None

        if path and self.args.load_best_model_at_end:
            on_rank_zero(check)

    def load_progress(self, checkpoint: str) -> None:
        """What this rank had counted since the last log line."""
        path = Path(checkpoint, f"progress_{self.args.process_index}.json")
        if not path.is_file():  # of another number of processes, which the log has said is not exact
            return
        progress = json.loads(path.read_text(encoding="utf-8"))
        self._tr_loss.fill_(progress["loss_since_log"])
        self.tokens_seen.fill_(progress["tokens_seen"])
        self._globalstep_last_logged, self.skipped = progress["last_log"], progress["skipped"]

    def _run_epoch(self, *args, epoch: int, train_dataloader: DataLoader, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at the end
            self.control.should_training_stop = True
            return
        set_epoch(train_dataloader, epoch)
        super()._run_epoch(*args, epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """Called after an update, and again after an epoch: what is due after its last update is done once, then."""
        ends_epoch = float(self.state.epoch).is_integer() or self.control.should_training_stop
        is_first, self.checked_step = self.state.global_step != self.checked_step, self.state.global_step
        if ends_epoch and is_first:
            return
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.signal:
            self.leave_if_asked()

    def leave_if_asked(self) -> None:
        """If a signal came to any rank: a checkpoint of this step, and Interrupted on all of them."""
        (self.signal,) = self.agree(self.watch.received)
        if self.signal:
            self._save_checkpoint(self.model, None)
            step, steps = self.state.global_step, self.state.max_steps
            never = str(self.args.resume_from_checkpoint).lower() == "false"
            command = "the same command without resume_from_checkpoint=false" if never else "the same command"
            logger.info(f"stopped at step {step} of {steps}; {command} continues from {self.folder.path}")
            raise Interrupted(self.signal)

    def _save_checkpoint(self, model, trial) -> None:
        """Whole or absent: all ranks write to a temporary folder, which rank 0 seals and renames."""
        step = self.state.global_step
        if self.folder is None or step == self.saved_step:
            return
        name = f"checkpoint-{step}"
        before, self.state.best_model_checkpoint = self.state.best_model_checkpoint, self.best_checkpoint(name)
        on_every_rank(self.check_finite)
        self.fill(name, self.write_checkpoint)
        self.publish(name)
        self.saved_step = step
        # An older checkpoint, if the run falls back to it, names the best one of its time, which must still be there.
        best = [Path(path) for path in (before, self.state.best_model_checkpoint) if path]
        on_rank_zero(lambda: self.folder.rotate(self.args.save_total_limit, best))

    def fill(self, name: str, write: Callable[[str], None]) -> None:
        """Have every rank write to the temporary folder of `name`; StorageError on all where one could not."""

        def work() -> None:
            try:
                write(str(temporary))
            except (RuntimeError, SafetensorError) as error:  # what libraries make of a full disk
                raise OSError(str(error)) from error

        try:
            temporary = on_rank_zero(lambda: self.folder.begin(name))
            on_every_rank(work)
        except OSError as error:
            self.fail(name, error)

    def publish(self, name: str) -> None:
        try:
            on_rank_zero(lambda: self.folder.finish(name, self.state.global_step, self.args.world_size))
        except OSError as error:
            self.fail(name, error)

    def fail(self, name: str, error: OSError) -> None:
        raise known_to_all(on_rank_zero(lambda: self.folder.failed(name, error))) from error

    def write_checkpoint(self, folder: str) -> None:
        self.save_model(folder, _internal_call=True)
        self._save_optimizer_and_scheduler(folder)
        self._save_scaler(folder)
        self._save_rng_state(folder)
        progress = {
            "loss_since_log": self._tr_loss.item(),
            "last_log": self._globalstep_last_logged,
            "tokens_seen": self.tokens_seen.item(),
            "skipped": self.skipped,
        }
        Path(folder, f"progress_{self.args.process_index}.json").write_text(json.dumps(progress), encoding="utf-8")
        if self.args.should_save:
            self.state.save_to_json(os.path.join(folder, "trainer_state.json"))

    def checkpoint_size(self) -> int:
        """Bytes of a checkpoint, about: the adapter, and its optimizer's state."""
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        state = optimizer_bytes(self.args.optim, on_card=False)
        return sum(weight.numel() * (weight.element_size() + state) for weight in trained)

    def check_finite(self) -> None:
        """Raise NumericError rather than write a weight or an optimizer's figure that is not finite."""
        states = chain.from_iterable(state.items() for state in self.optimizer.state.values())
        tensors = chain(
            ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad),
            ((f"the optimizer's {name}", value) for name, value in states if isinstance(value, torch.Tensor)),
        )
        bad = [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
        if bad:
            raise NumericError(
                f"step {self.state.global_step}: {bad[0]} and {len(bad) - 1} others are not finite, so nothing is "
                "written; lower learning_rate"
            )

    def save_final(self) -> str:
        """Publish adapter and tokenizer as FINAL: the mark of a run that is done."""
        on_every_rank(self.check_finite)
        self.fill(FINAL, lambda folder: self.save_model(folder, _internal_call=True))
        self.leave_if_asked()
        self.publish(FINAL)
        return str(self.folder.path / FINAL)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """The adapter that the manifest vouches for, whatever else lies there."""
        weights = load_file(Path(resume_from_checkpoint, "adapter_model.safetensors"))
        set_peft_model_state_dict(self.model, weights)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states of optimizer and scheduler, and give them the settings of now, which may be others."""
        fresh = [dict(group) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if not checkpoint:
            return
        groups = self.optimizer.param_groups
        scheduler = self.lr_scheduler
        was = groups[0]["lr"]
        for group, new in zip(groups, fresh, strict=True):
            group.update({key: new[key] for key in HYPERPARAMETERS if key in new})
        if isinstance(scheduler, LambdaLR):  # its rate is that of the step; any other's follows from the one before
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            for group, rate in zip(groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * rate(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in groups]
        if groups[0]["lr"] != was:
            logger.warning(f"learning rate {was:.2e} until now, {groups[0]['lr']:.2e} at the next update")

    def _load_best_model(self) -> None:
        self.leave_if_asked()
        best = self.state.best_model_checkpoint
        self.check_best(best)
        self._load_from_checkpoint(best)
        name = Path(best).name
        score = f"{self.args.metric_for_best_model} {self.scores()[name]:.4f}"
        logger.info(f"the final adapter is that of {name}, the best that was saved: {score}")
        self.saved_step = self.state.global_step  # these are not the weights of the last step: no checkpoint of them

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The adapter and the tokenizer, as safetensors and JSON; no pickle of the arguments."""
        if not self.args.should_save:  # transformers 5.23 and 5.24 call this on every rank
            return
        output_dir = output_dir or self.args.output_dir
        self.model.save_pretrained(output_dir, save_embedding_layers=False)
        self.processing_class.save_pretrained(output_dir)


def start_worker(seed_worker: Callable[[int], None] | None, worker: int) -> None:
    outlive_signals()
    if seed_worker:
        seed_worker(worker)


def place_of(dataset, input_ids: list[int] | np.ndarray) -> str:
    """`file:line` of the first sample with these tokens, where the dataset knows it."""
    place = dataset.find_place(input_ids) if hasattr(dataset, "find_place") else None
    return place or f"a sample of {len(input_ids)} tokens that begins with {list(map(int, input_ids[:10]))}"


class Continuation(TrainerCallback):
    """When the loop is set up to continue: counters as they were, and an evaluation that a signal cut short."""

    def __init__(self, trainer: LoRATrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            return
        self.trainer.load_progress(self.trainer.resumed_from)
        if args.eval_strategy == "epoch":
            due, delay = float(state.epoch).is_integer(), state.epoch
        else:
            due, delay = state.global_step % state.eval_steps == 0, state.global_step
        due = due or state.global_step >= state.max_steps
        done = any(entry["step"] == state.global_step for entry in state.log_history if "eval_loss" in entry)
        if args.eval_strategy != "no" and due and not done and args.eval_delay <= delay:
            metrics = self.trainer._evaluate(None, None)
            self.trainer._determine_best_metric(metrics, None)
            state.best_model_checkpoint = self.trainer.best_checkpoint()
