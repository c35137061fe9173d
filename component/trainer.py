"""Trainer for an adapter: the loss over learned tokens, exact under accumulation and ranks; adapter-only saves."""

import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from itertools import chain, islice

import torch
from loguru import logger
from torch.utils.data import DataLoader, Sampler, Subset
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from .collator import Samples
from .loss import TargetLMLoss


class LoRATrainer(Trainer):
    """transformers' Trainer over what component.collator makes: padded batches, or packed rows of whole updates.

    An update's loss is the sum over its learned tokens, of all accumulated batches and ranks, divided by their number,
    so that 4 batches of 1 weigh every token as 1 batch of 4 does.
    """

    def __init__(self, *args, loss: TargetLMLoss, **kwargs):
        # As compute_loss_func, the loss is not scaled a second time for accumulation.
        super().__init__(*args, compute_loss_func=loss, **kwargs)
        self.loss = loss
        self.tokens_seen = torch.zeros((), dtype=torch.int64, device=self.args.device)
        for shown in (ProgressCallback, PrinterCallback):
            self.remove_callback(shown)
        self.add_callback(ProgressReport(show_bar=not self.args.disable_tqdm))

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The batches of an update, and its learned tokens. Packed rows, made of all its samples, are the last one."""
        batches = list(islice(epoch_iterator, num_batches))
        if batches and isinstance(batches[0], Samples):
            samples = [sample for batch in batches for sample in batch.samples]
            batches = [[] for _ in batches[1:]] + [self.data_collator.rows(samples)]
        else:
            batches = [[batch] for batch in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[list[dict]], device: torch.device) -> torch.Tensor:
        """Learned tokens of one update, over all its batches and all ranks."""
        count = sum(self.count(part) for parts in batch_samples for part in parts)
        return self.accelerator.reduce(torch.as_tensor(count, device=device), "sum")

    def count(self, part: dict) -> torch.Tensor | int:
        """Learned tokens of a padded batch or a packed row."""
        return len(part["targets"]) if "targets" in part else self.loss.count(part["target_mask"]).sum()

    def summed_loss(self, model, part: dict) -> torch.Tensor:
        """Over the learned tokens of a padded batch or a packed row, whose forward computes it (PackedForward)."""
        if "targets" in part:
            return model(**part)
        logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
        return self.loss(logits, part["input_ids"], part["target_mask"], num_targets=1)

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        loss = self.summed_loss(model, inputs) / (
            self.count(inputs) if num_items_in_batch is None else num_items_in_batch
        )
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # ranks average their gradients; the sum is wanted
        return (loss, None) if return_outputs else loss

    def training_step(self, model, inputs: list[dict], num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward of a padded batch, or of an update's packed rows; ranks meet in the last one."""
        total = torch.zeros((), device=self.args.device)
        for part in inputs:
            with nullcontext() if part is inputs[-1] else self.accelerator.no_sync(model):
                total += super().training_step(model, part, num_items_in_batch)
            seen = part["attention_mask"].sum() if "attention_mask" in part else len(part["input_ids"])
            self.tokens_seen += seen if isinstance(seen, int) else seen.to(self.tokens_seen.device)
        return total

    def floating_point_ops(self, inputs: list[dict]) -> int:
        return 0  # the estimate is of no use to us, and knows no rows

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(self.train_dataset, "lengths"):
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(self.train_dataset.lengths, batch, self.args.seed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["num_tokens"] = self.accelerator.reduce(self.tokens_seen.clone(), "sum").item()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss per learned token over the whole of `eval_dataset`, each row counted once on any number of ranks."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        own = Subset(dataset, range(self.args.process_index, len(dataset), self.args.world_size))
        batches = DataLoader(own, self.args.eval_batch_size, collate_fn=self.data_collator)
        self.model.eval()
        totals = torch.zeros(2, device=self.args.device)
        with torch.no_grad():
            parts = (self.data_collator.rows(b.samples) if isinstance(b, Samples) else [b] for b in batches)
            for part in map(self._prepare_inputs, chain.from_iterable(parts)):
                totals += torch.stack(
                    (self.summed_loss(self.model, part), torch.as_tensor(self.count(part)).to(totals))
                )
        totals = self.accelerator.reduce(totals, "sum")
        metrics = {f"{metric_key_prefix}_loss": (totals[0] / totals[1]).item()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The adapter and the tokenizer, as safetensors and JSON; no pickle of the arguments."""
        if not self.args.should_save:  # transformers 5.23 calls this on every rank
            return
        output_dir = output_dir or self.args.output_dir
        self.model.save_pretrained(output_dir, save_embedding_layers=False)
        self.processing_class.save_pretrained(output_dir)


class LengthGroupedSampler(Sampler[int]):
    """Shuffles, then sorts stretches of 50 batches by length, the longest sample first of all, so that batches are of
    like samples and memory runs out at once or never. The order follows from seed and epoch alone."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        order = draw.sample(range(len(self)), len(self))
        stretch = 50 * self.batch
        groups = [sorted(order[i : i + stretch], key=lambda i: -self.lengths[i]) for i in range(0, len(order), stretch)]
        batches = [group[i : i + self.batch] for group in groups for i in range(0, len(group), self.batch)]
        last = batches.pop() if len(batches[-1]) < self.batch and len(batches) > 1 else []  # the short one stays last
        draw.shuffle(batches)
        first = max(range(len(batches)), key=lambda i: max(self.lengths[j] for j in batches[i]))
        batches[0], batches[first] = batches[first], batches[0]
        return iter([i for batch in batches for i in batch] + last)


class ProgressReport(TrainerCallback):
    """Loss, learning rate, tokens/s and time left: a log line every `logging_steps`, and a bar on a terminal."""

    def __init__(self, show_bar: bool):
        self.show_bar = show_bar and sys.stderr.isatty()
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step, self.tokens = time.monotonic(), state.global_step, 0
        self.logged_at = self.started
        if self.show_bar and state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs: dict, **kwargs):
        if "eval_loss" in logs:
            logger.info(f"step {state.global_step}/{state.max_steps}  eval_loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        now = time.monotonic()
        speed = (logs["num_tokens"] - self.tokens) / (now - self.logged_at)
        self.tokens, self.logged_at = logs["num_tokens"], now
        step_seconds = (now - self.started) / max(state.global_step - self.first_step, 1)
        left = timedelta(seconds=round(step_seconds * (state.max_steps - state.global_step)))
        figures = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  {speed:,.0f} tokens/s"
        logger.info(f"step {state.global_step}/{state.max_steps}  {figures}  {left} left")
        if self.bar is not None:
            self.bar.set_postfix_str(figures)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
