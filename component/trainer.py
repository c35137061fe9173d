"""Trainer for an adapter: the loss over learned tokens, exact under accumulation and ranks; adapter-only saves."""

import sys
import time
from datetime import timedelta

import torch
from loguru import logger
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from .loss import TargetLMLoss


class LoRATrainer(Trainer):
    """transformers' Trainer over batches of `input_ids`, `attention_mask` and `target_mask`.

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

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        """Learned tokens of one update, over all its batches and all ranks."""
        count = sum(self.loss.count(batch["target_mask"]).sum() for batch in batch_samples).to(device)
        return self.accelerator.reduce(count, "sum")

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = self.loss(outputs.logits, inputs["input_ids"], inputs["target_mask"], num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # ranks average their gradients; the sum is wanted
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.tokens_seen += inputs["attention_mask"].sum().to(self.tokens_seen.device)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["num_tokens"] = self.accelerator.reduce(self.tokens_seen.clone(), "sum").item()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss per learned token over the whole of `eval_dataset`, each row counted once on any number of ranks."""
        self.model.eval()
        totals = torch.zeros(2, device=self.args.device)
        for batch in self.get_eval_dataloader(eval_dataset):
            with torch.no_grad():
                logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            losses = self.loss.by_row(logits, batch["input_ids"], batch["target_mask"])
            losses, counts = self.accelerator.gather_for_metrics((losses, self.loss.count(batch["target_mask"])))
            totals += torch.stack((losses.sum(), counts.sum()))
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
