"""Trial of the optimizer and the learning rate's schedule over one weight, so that faults of their settings are found
before anything expensive starts."""

import math
from copy import copy
from typing import Any

from loguru import logger

TRIED = 50  # steps of a schedule that are checked; also its assumed length where the data decides it
FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, ImportError)

# Prefixes of the names of transformers' optimizers that do not work with an adapter, and why.
REFUSED_OPTIMIZERS = {
    ("galore", "apollo"): "it projects the gradients of full weights, and an adapter's are of low rank already",
    ("lomo", "adalomo"): "it changes weights during the backward, before the gradients of an update are complete",
    ("schedule_free",): "it has other weights for training than for evaluation and checkpoints",
}
WITHOUT_KWARGS = ("constant", "constant_with_warmup")
FOLLOWING_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")  # schedules whose rate depends on evaluations
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")


def check_optimization(training_args, asked: dict[str, Any]) -> None:
    """Build the optimizer and the schedule as the settings ask for them, and check the schedule. Needs no CUDA.

    Args:
        training_args: transformers.TrainingArguments, whose `optim` may be adapted to the machine.
        asked: the settings before they were adapted.

    Raises:
        ValueError: `optim`, `optim_args`, `lr_scheduler_type` and `lr_scheduler_kwargs` do not go together.
    """
    from transformers.training_args import OptimizerNames

    training_args = copy(training_args)
    training_args.optim = OptimizerNames(asked.get("optim", training_args.optim))
    training_args.optim_args = asked.get("optim_args")
    check_schedule(training_args, build_optimizer(training_args))


def build_optimizer(training_args):
    """Build the optimizer of `optim` and `optim_args` over one weight on the CPU.

    Raises:
        ValueError: it is refused or cannot be built, or it does not take these arguments.
    """
    import torch

    optim, written = training_args.optim.value, training_args.optim_args or ""
    for beginnings, why in REFUSED_OPTIMIZERS.items():
        if optim.startswith(beginnings):
            raise ValueError(f"optim {optim} is not supported: {why}; the default is paged_adamw_32bit")
    items = written.replace(" ", "").split(",") if written else []
    try:
        if malformed := [item for item in items if item.count("=") != 1]:
            raise ValueError(f"{malformed[0]!r} is not key=value; several are separated by commas")
        if unread := [item for item in items if not reads(training_args, item)]:
            raise ValueError(f"it takes no {unread[0].partition('=')[0]!r}")
        make, kwargs = parts_of(training_args, written)
        return make([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    except FAULTS as error:
        raise ValueError(f"{'optim_args' if written else 'optim'}: {optim} cannot be built: {error}") from error


def parts_of(training_args, optim_args: str) -> tuple[type, dict[str, Any]]:
    """The optimizer's class and keyword arguments, as Trainer will choose them."""
    from transformers import Trainer

    changed = copy(training_args)
    changed.optim_args = optim_args
    return Trainer.get_optimizer_cls_and_kwargs(changed)


def reads(training_args, item: str) -> bool:
    """Whether the optimizer takes a `key=value` of optim_args. `key=1` is tried too: the value may be the default."""
    without = parts_of(training_args, "")
    return any(parts_of(training_args, tried) != without for tried in (item, f"{item.partition('=')[0]}=1"))


def check_schedule(training_args, optimizer) -> None:
    """Build a run's schedule and check its learning rates.

    Raises:
        ValueError: the schedule cannot be built from its keywords, or a rate is negative or not finite.
    """
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import get_scheduler

    name, kwargs = training_args.lr_scheduler_type.value, training_args.lr_scheduler_kwargs
    steps = training_args.max_steps if training_args.max_steps > 0 else TRIED + int(training_args.warmup_steps)
    warmup = training_args.get_warmup_steps(steps)
    if warmup and name in WITHOUT_WARMUP:
        logger.warning(f"warmup_steps has no effect: lr_scheduler_type {name} has no warm-up")
    try:
        if kwargs and name in WITHOUT_KWARGS:
            raise ValueError("it takes no keywords")
        schedule = get_scheduler(name, optimizer, warmup, steps, kwargs)
        if isinstance(schedule, LambdaLR):
            places = {*range(0, steps + 1, math.ceil(steps / TRIED)), warmup, warmup + 1}
            rates = {step: schedule.lr_lambdas[0](step) for step in sorted(places)}
            if bad := [step for step, rate in rates.items() if not 0 <= rate < math.inf]:
                raise ValueError(f"the learning rate of step {bad[0]} is {rates[bad[0]]} times learning_rate")
        else:
            schedule.step(1.0)
    except FAULTS as error:
        raise ValueError(
            f"lr_scheduler_kwargs {kwargs or {}}: lr_scheduler_type {name} cannot be built: {error}"
        ) from error
