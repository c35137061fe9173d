"""Writes and loads checkpoints. All ranks write one together, and it is there whole or not at all."""

import json
import math
import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from loguru import logger
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from ..card.card import write_card
from ..card.facts import TRAINING
from ..data.load import describe_sources
from ..kernel.memory import optimizer_bytes
from ..run.errors import NumericError, StorageError
from ..run.folder import RunFolder
from ..run.manifest import CARD, Damaged, verify
from ..run.ranks import known_to_all, on_every_rank, on_rank_zero
from ..run.resume import FINAL, find_checkpoints, step_of
from .early_stopping import metric_of

STATE, STREAM = "trainer_state.json", "stream.json"
HYPERPARAMETERS = ("initial_lr", "weight_decay", "betas", "eps", "momentum", "alpha")  # in an optimizer's groups


class Counters:
    """Counts what a run has done, on the host.

    Each rank has its own `loss`, its part of the sum of the losses of `updates` updates, which are those since the last
    log line, and its own `tokens`, which it has learned from. All else is alike on all ranks. `norm` and `rate` are the
    gradient norm and the learning rate of the last update. `in_epoch` counts the updates of `epoch`, `skipped` those
    that were left out, and `overflows` those in a row that overflowed float16. `asked` holds the steps at which
    callbacks asked for a checkpoint, unlike those at which a signal did.
    """

    ALIKE = ("updates", "skipped", "overflows", "rate", "epoch", "in_epoch", "epoch_has_ended", "asked")

    def __init__(self):
        self.loss = torch.zeros(())
        self.tokens = torch.zeros((), dtype=torch.int64)
        self.norm, self.rate = torch.zeros(()), 0.0
        self.updates = self.skipped = self.overflows = self.epoch = self.in_epoch = 0
        self.epoch_has_ended = True  # False from an update until `end_epoch` has run
        self.asked: list[int] = []

    def add(self, losses: list[torch.Tensor]) -> None:
        """Count an update. `losses` are what each batch of this rank adds to its loss."""
        for loss in losses:
            self.loss += loss
        self.updates += 1

    def begin_line(self) -> None:
        self.loss.zero_()
        self.updates = 0

    def state_dict(self) -> dict:
        own = {"loss_since_log": self.loss.item(), "tokens_seen": self.tokens.item()}
        norm = self.norm.item()
        return (
            own | {"norm": norm if math.isfinite(norm) else None} | {name: getattr(self, name) for name in self.ALIKE}
        )

    def load_state_dicts(self, states: list[dict], rank: int, ranks: int) -> None:
        """Restore what the ranks of a checkpoint, in their order, had counted. If their number has changed, rank 0 goes
        on from the sums of all."""
        alike = {name: states[0][name] for name in self.ALIKE}
        vars(self).update(alike)
        self.norm = torch.tensor(math.nan if states[0]["norm"] is None else states[0]["norm"])
        for counter, key in ((self.loss, "loss_since_log"), (self.tokens, "tokens_seen")):
            own = [state[key] for state in states]
            counter.fill_(own[rank] if len(own) == ranks else sum(own) * (rank == 0))


def renew_progress(states: list[dict], step: int, updates_per_epoch: int, saved: list[int]) -> list[dict]:
    """The counters of a checkpoint's ranks, of which earlier versions wrote fewer, and losses as means over ranks.

    Args:
        saved: the steps of all checkpoints, each of which may be the best one to an earlier version.
    """
    if "last_log" not in states[0]:
        return states
    epoch, in_epoch = divmod(step, updates_per_epoch)
    place = {"epoch": epoch, "in_epoch": in_epoch, "epoch_has_ended": True, "asked": saved}
    return [
        place
        | {"updates": step - state["last_log"], "skipped": state["skipped"], "overflows": 0, "rate": 0.0, "norm": None}
        | {"loss_since_log": state["loss_since_log"] / len(states), "tokens_seen": state["tokens_seen"]}
        for state in states
    ]


class RandomNumbers:
    """The states of this process's random number generators: Python's, numpy's, torch's, and its card's."""

    def state_dict(self) -> dict:
        state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
        return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})

    def load_state_dict(self, state: dict) -> None:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["cpu"])
        if torch.cuda.is_available() and "cuda" in state:
            of_card = state["cuda"]  # earlier versions wrote a list, for all cards of the machine
            torch.cuda.set_rng_state(of_card[torch.cuda.current_device()] if isinstance(of_card, list) else of_card)


class Checkpoints:
    """Saves and loads the checkpoints of a trainer's run in its folder. Without a folder, nothing is saved.

    A checkpoint holds the adapter and the tokenizer; the states of optimizer, schedule and scaler; the random numbers
    and counters of each rank; the place in a stream; and transformers' TrainerState.
    """

    def __init__(self, trainer, folder: RunFolder | None):
        self.trainer, self.folder, self.args = trainer, folder, trainer.args
        self.random = RandomNumbers()
        self.saved_step = 0

    def shared_parts(self) -> dict:
        """Objects whose state is the same on all ranks, by the name of the file in which rank 0 saves it."""
        trainer = self.trainer
        parts = {"optimizer.pt": trainer.optimizer, "scheduler.pt": trainer.lr_scheduler}
        return parts | ({"scaler.pt": trainer.accelerator.scaler} if trainer.accelerator.scaler else {})

    def own_files(self) -> tuple[str, str]:
        """Names of the files for this rank's random numbers and for its counters."""
        rank = self.args.process_index
        return "rng_state.pth" if self.args.world_size == 1 else f"rng_state_{rank}.pth", f"progress_{rank}.json"

    def save(self) -> None:
        """Write a checkpoint of this step, unless it was written before.

        All ranks write to a temporary folder, which rank 0 seals and renames. Then rank 0 deletes the oldest ones.
        """
        state = self.trainer.state
        if self.folder is None or state.global_step == self.saved_step:
            return
        name = f"checkpoint-{state.global_step}"
        before, state.best_model_checkpoint = state.best_model_checkpoint, self.best(about_to_be_written=name)
        self.require_finite()
        self.fill(name, self.write)
        self.publish(name)
        self.saved_step = state.global_step
        # A run that falls back to an older checkpoint needs the one that was the best at that time.
        best = [Path(path) for path in (before, state.best_model_checkpoint) if path]
        on_rank_zero(lambda: self.folder.rotate(self.args.save_total_limit, best))

    def write_final(self) -> None:
        """Write adapter and tokenizer beside their place, for `publish`."""
        self.require_finite()
        self.fill(FINAL, self.write_adapter_and_card)

    def write_adapter_and_card(self, folder: Path) -> None:
        self.write_adapter(folder)
        if self.args.process_index == 0:
            base = self.trainer.model.active_peft_config.base_model_name_or_path
            write_card(folder, "adapter", base, folder, record=self.describe(FINAL))

    def write_adapter(self, folder: Path) -> None:
        """Write adapter and tokenizer, without the card that peft adds: it says nothing, and names the base's path."""
        self.trainer.save_model(str(folder))
        if self.args.process_index == 0:
            (folder / CARD).unlink(missing_ok=True)

    def describe(self, name: str) -> dict:
        """What the manifest of `name` says; that of the final adapter also tells its data and its figures."""
        facts = self.folder.describe(name, self.trainer.state.global_step, self.args.world_size)
        return facts | ({TRAINING: self.describe_training()} if name == FINAL else {})

    def describe_training(self) -> dict:
        """The data of the run, the update whose weights are the final ones, and the last figures until then."""
        trainer, state = self.trainer, self.trainer.state
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        step = step_of(Path(best)) if best else state.global_step
        until = [entry for entry in state.log_history if entry["step"] <= step]
        figures = {key: entry[key] for entry in until for key in ("loss", "eval_loss") if key in entry}
        data = {"data": describe_sources(trainer.train_dataset), "evaluation": describe_sources(trainer.eval_dataset)}
        return data | {"step": step} | figures

    def require_finite(self) -> None:
        """Raise NumericError on all ranks rather than write a figure that is not finite."""
        trainer = self.trainer
        on_every_rank(lambda: require_finite(trainer.model, trainer.optimizer, trainer.state.global_step))

    def fill(self, name: str, write: Callable[[Path], None]) -> None:
        """Have every rank write to the temporary folder of `name`. Raises StorageError on all ranks if one cannot."""

        def work() -> None:
            try:
                write(temporary)
            except (RuntimeError, SafetensorError) as error:  # which libraries raise when a disk is full
                raise OSError(str(error)) from error

        try:
            temporary = on_rank_zero(lambda: self.folder.begin(name))
            on_every_rank(work)
        except OSError as error:
            self.fail(name, error)

    def publish(self, name: str) -> str:
        """Seal and rename what was written. Returns the path. From here on the folder is there, and whole."""
        try:
            on_rank_zero(lambda: self.folder.finish(name, self.describe(name)))
        except OSError as error:
            self.fail(name, error)
        return str(self.folder.path / name)

    def fail(self, name: str, error: OSError) -> None:
        raise known_to_all(on_rank_zero(lambda: self.folder.failed(name, error))) from error

    def write(self, folder: Path) -> None:
        """Write this rank's files of a checkpoint."""
        trainer = self.trainer
        self.write_adapter(folder)
        numbers, counters = self.own_files()
        torch.save(self.random.state_dict(), folder / numbers)
        control, step = trainer.control, trainer.state.global_step
        progress = {  # with what callbacks have asked for, and a signal has prevented
            "evaluate": control.should_evaluate,
            "save": control.should_save and step not in trainer.counters.asked,
            "end_epoch": control.should_epoch_stop,
            "updates_per_epoch": trainer.updates.per_epoch,
        }
        write_json(folder / counters, trainer.counters.state_dict() | progress)
        if self.args.process_index == 0:
            for name, part in self.shared_parts().items():
                torch.save(part.state_dict(), folder / name)
            if place := trainer.updates.state_dict():
                write_json(folder / STREAM, place)
            trainer.state.save_to_json(str(folder / STATE))

    def load(self, checkpoint: str) -> None:
        """Restore everything from a checkpoint, then give optimizer and schedule the current settings."""
        state = on_every_rank(lambda: TrainerState.load_from_json(str(Path(checkpoint, STATE))))
        self.trainer.state = state
        self.saved_step = state.global_step
        if self.folder and state.best_model_checkpoint:  # by its name, as the folder may have been moved
            self.check_best(str(self.folder.path / Path(state.best_model_checkpoint).name))
        on_every_rank(lambda: self.read(Path(checkpoint)))
        state.best_model_checkpoint = self.best()

    def read(self, folder: Path) -> None:
        """Restore what this rank needs of a checkpoint."""
        trainer, rank, ranks = self.trainer, self.args.process_index, self.args.world_size
        self.load_adapter(folder)
        fresh = [dict(group) for group in trainer.optimizer.param_groups]
        for name, part in self.shared_parts().items():
            if (folder / name).is_file():  # a damaged checkpoint, used on request, may lack one
                part.load_state_dict(torch.load(folder / name, map_location="cpu", weights_only=True))
        self.renew_optimizer(fresh)
        numbers = folder / self.own_files()[0]
        if numbers.is_file():  # otherwise the number of processes has changed, as the log has said
            with safe_globals():
                self.random.load_state_dict(torch.load(numbers, weights_only=True))
        if states := read_progress(folder):
            per_epoch = trainer.updates.per_epoch
            saved = [step_of(path) for path in find_checkpoints(folder.parent)]
            states = renew_progress(states, trainer.state.global_step, per_epoch, saved)
            trainer.counters.load_state_dicts(states, rank, ranks)
            if states[0].get("updates_per_epoch", per_epoch) != per_epoch:  # with another batch, or another max_steps
                trainer.counters.epoch, trainer.counters.in_epoch = divmod(trainer.state.global_step, per_epoch)
            trainer.control.should_evaluate = states[0].get("evaluate", False)
            trainer.control.should_save = states[0].get("save", False)
            trainer.control.should_epoch_stop = states[0].get("end_epoch", False)
        if (folder / STREAM).is_file() and not self.args.ignore_data_skip:
            trainer.updates.load_state_dict(json.loads((folder / STREAM).read_text(encoding="utf-8")))

    def load_adapter(self, folder: Path) -> None:
        """Load the adapter's safetensors, which the manifest covers, and no other file of weights."""
        set_peft_model_state_dict(self.trainer.model, load_file(folder / "adapter_model.safetensors"))

    def renew_optimizer(self, fresh: list[dict]) -> None:
        """Give the optimizer the current settings, which may have changed since the checkpoint.

        Args:
            fresh: the optimizer's groups as the current settings made them.
        """
        groups, schedule = self.trainer.optimizer.param_groups, self.trainer.lr_scheduler
        was = groups[0]["lr"]
        for group, new in zip(groups, fresh, strict=True):
            group.update({key: new[key] for key in HYPERPARAMETERS if key in new})
        if isinstance(schedule, LambdaLR):  # its rate follows from the step; that of others, from the last rate
            schedule.base_lrs = [group["initial_lr"] for group in groups]
            for group, rate in zip(groups, schedule.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * rate(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in groups]
        if groups[0]["lr"] != was:
            logger.warning(f"learning rate {was:.2e} until now, {groups[0]['lr']:.2e} at the next update")

    def scores(self) -> dict[str, float]:
        """Scores of the evaluated steps, by the name that a checkpoint of the step has or would have."""
        key, history = metric_of(self.args), self.trainer.state.log_history
        return {f"checkpoint-{entry['step']}": entry[key] for entry in history if key in entry}

    def best(self, about_to_be_written: str = "") -> str | None:
        """Path of the saved checkpoint with the best score, if any. `about_to_be_written` counts as saved.

        A checkpoint that only a signal asked for does not count, so that a stop changes no result.
        """

        def choose() -> str | None:
            asked = {f"checkpoint-{step}" for step in self.trainer.counters.asked}
            known = asked & {about_to_be_written, *(path.name for path in find_checkpoints(self.folder.path))}
            scores = {name: score for name, score in self.scores().items() if name in known}
            pick = max if self.args.greater_is_better else min
            return str(self.folder.path / pick(scores, key=scores.get)) if scores else None

        return on_rank_zero(choose) if self.folder and self.args.metric_for_best_model else None

    def check_best(self, path: str) -> None:
        """Raise StorageError if the final adapter is to come from this checkpoint, and the checkpoint is damaged."""

        def check() -> None:
            try:
                verify(Path(path), Path(path).name)
            except Damaged as damage:
                raise StorageError(
                    f"{path} has the best model, and {damage}; put it back, or go on without it by "
                    "load_best_model_at_end=false and resume_despite_changes=true"
                ) from None

        if self.args.load_best_model_at_end:
            on_rank_zero(check)

    def load_best(self) -> None:
        """Load the adapter of the best checkpoint that was saved, if there is one."""
        best = self.trainer.state.best_model_checkpoint = self.best()
        if best is None:
            logger.warning("no checkpoint was evaluated, so the final adapter is that of the last step")
            return
        self.check_best(best)
        self.load_adapter(Path(best))
        name = Path(best).name
        score = f"{self.args.metric_for_best_model} {self.scores()[name]:.4f}"
        logger.info(f"the final adapter is that of {name}, the best that was saved: {score}")
        self.saved_step = self.trainer.state.global_step  # so that these weights are not saved as this step's

    def tell_how_to_go_on(self) -> None:
        """Log how to continue a run that a signal has ended."""
        state, folder = self.trainer.state, self.folder.path if self.folder else "nowhere"
        never = str(self.args.resume_from_checkpoint).lower() == "false"
        command = "the same command without resume_from_checkpoint=false" if never else "the same command"
        logger.info(f"stopped at step {state.global_step} of {state.max_steps}; {command} continues from {folder}")

    def size(self) -> int:
        """Estimate the bytes of a checkpoint: the adapter and its optimizer's state."""
        state = optimizer_bytes(self.args.optim, on_card=False)
        return sum(weight.numel() * (weight.element_size() + state) for weight in self.trainer.trained_weights())


def read_progress(folder: Path) -> list[dict]:
    """What each rank had counted, in order of rank."""
    files = sorted(folder.glob("progress_*.json"), key=lambda path: int(path.stem.rpartition("_")[2]))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def require_finite(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Raise NumericError if a trained weight or a figure of the optimizer is not finite."""
    states = chain.from_iterable(state.items() for state in optimizer.state.values())
    tensors = chain(  # weights first: reading them waits for the card, which may still change paged states
        ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad),
        ((f"the optimizer's {name}", value) for name, value in states if isinstance(value, torch.Tensor)),
    )
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise NumericError(
            f"step {step}: {bad[0]} and {len(bad) - 1} others are not finite, so nothing is written; lower "
            "learning_rate"
        )


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
