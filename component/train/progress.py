"""Messages during training: progress, and warnings of losses that look like a mistake."""

import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from loguru import logger
from tqdm import tqdm
from transformers import TrainerCallback

from .report import plot_loss

LONG = 600  # seconds; a run that will take longer says so after its first update


class LossWatch(TrainerCallback):
    """Warns of losses that look like a mistake, once for each kind, and names the likely cause."""

    WINDOW, SPIKE, ZERO = 50, 3.0, 1e-6  # number of logged losses; multiple of their median; loss

    def __init__(self):
        self.losses: list[float] = []
        self.said: set[str] = set()

    def on_log(self, args, state, control, logs: dict, **kwargs):
        if "loss" not in logs:
            return
        loss, before = logs["loss"], self.losses[-self.WINDOW :]
        self.losses.append(loss)
        if loss < self.ZERO:
            self.say(state, "zero", f"the loss is {loss:.1e}: are all answers alike, or known to the model already?")
        if len(before) >= 10 and loss > max(self.SPIKE * statistics.median(before), 1):
            usual = statistics.median(before)
            self.say(
                state, "spike", f"the loss is {loss:.2f} after {usual:.2f}: odd rows, or too high a learning_rate?"
            )
        windows, rest = divmod(len(self.losses), self.WINDOW)
        if windows > 1 and not rest:
            first, last = map(statistics.median, (self.losses[: self.WINDOW], self.losses[-self.WINDOW :]))
            if last >= first:
                self.say(
                    state, "flat", f"the loss is {last:.4f}, and was {first:.4f} at first: is learning_rate right?"
                )

    def say(self, state, kind: str, message: str) -> None:
        if kind not in self.said and state.is_world_process_zero:
            logger.warning(f"step {state.global_step}: {message}")
        self.said.add(kind)


class ProgressReport(TrainerCallback):
    """Shows loss, learning rate, tokens/s and time left: a log line every `logging_steps`, and a bar on a terminal."""

    def __init__(self, total_tokens: Callable[[], int], show_bar: bool):
        self.total_tokens = total_tokens
        self.show_bar = show_bar and sys.stderr.isatty()
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.tokens, self.first_step = self.total_tokens(), state.global_step
        self.started = self.logged_at = self.paused_at = time.monotonic()
        if self.show_bar and state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.first_step:
            self.started = self.logged_at = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.paused_at = time.monotonic()
        if state.global_step == self.first_step + 1 and state.is_world_process_zero:
            took, left = self.paused_at - self.started, state.max_steps - state.global_step
            if took * left > LONG:
                logger.info(
                    f"the first update took {took:.0f} s: at this speed, the other {left:,} take "
                    f"{timedelta(seconds=round(took * left))}"
                )
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_save(self, args, state, control, **kwargs):
        """Leave the time of an evaluation or a save out of the next tokens/s."""
        now = time.monotonic()
        self.logged_at += now - self.paused_at
        self.paused_at = now

    on_evaluate = on_save

    def on_log(self, args, state, control, logs: dict, **kwargs):
        if "eval_loss" in logs:
            logger.info(f"step {state.global_step}/{state.max_steps}  eval_loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        now = time.monotonic()
        speed = (logs["num_tokens"] - self.tokens) / (now - self.logged_at)
        self.tokens, self.logged_at, self.paused_at = logs["num_tokens"], now, now
        step_seconds = (now - self.started) / max(state.global_step - self.first_step, 1)
        left = timedelta(seconds=round(step_seconds * (state.max_steps - state.global_step)))
        figures = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  {speed:,.0f} tokens/s"
        logger.info(f"step {state.global_step}/{state.max_steps}  {figures}  {left} left")
        if self.bar is not None:
            self.bar.set_postfix_str(figures)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


class LossPicture(TrainerCallback):
    """Draws the losses so far, on rank 0, after every evaluation and every checkpoint."""

    def __init__(self, path: Path):
        self.path = path
        self.drawn_at = 0  # step

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step != self.drawn_at:
            self.drawn_at = state.global_step
            plot_loss(state.log_history, self.path)

    on_save = on_evaluate
