"""Adaptation of settings to the hardware, to one another and to our own parts."""

import os
from typing import Any

from loguru import logger

from .fields import FIXED
from .schema import QLoRAArguments

NEEDS_CUDA = ("paged", "bnb", "8bit", "lion", "ademamix")  # parts of the names of optimizers


def adapt_to_machine(args: QLoRAArguments, values: dict[str, Any]) -> dict[str, Any]:
    """Return TrainingArguments' settings adapted to the hardware and to `args`, and log whatever overrules the file.

    `args.compute_dtype` is set, too.
    """
    import torch

    has_cuda = torch.cuda.is_available() and not values.get("use_cpu", False)
    if has_cuda:
        check_card()
    args.compute_dtype = choose_compute_dtype(args.compute_dtype, values, has_cuda)
    adapted = (
        values
        | FIXED
        | {
            "use_cpu": not has_cuda,
            "fp16": args.compute_dtype == "float16",
            "bf16": args.compute_dtype == "bfloat16",
        }
    )
    for key, value in FIXED.items():
        if values.get(key, value) != value:
            logger.warning(f"{key}={values[key]} is not possible here; using {value}")
    adapted.setdefault("optim", "paged_adamw_32bit")
    if not has_cuda and any(part in adapted["optim"] for part in NEEDS_CUDA):
        if "optim" in values:
            logger.warning(f"optim={values['optim']} needs CUDA; using adamw_torch")
        adapted |= {"optim": "adamw_torch", "optim_args": None}
    if not has_cuda and values.get("tf32"):
        logger.warning("tf32 needs CUDA; computing in float32")
        adapted["tf32"] = None
    if values.get("max_steps", -1) > 0 and "num_train_epochs" in values:
        logger.info(
            f"num_train_epochs={values['num_train_epochs']:g} has no effect: max_steps={values['max_steps']} decides"
        )
    if values.get("save_total_limit") == 1:
        logger.info("save_total_limit: 1 is raised to 2, since a run keeps a whole checkpoint while it writes another")
        adapted["save_total_limit"] = 2
    if args.streaming and (order := values.get("train_sampling_strategy", "random")) != "random":
        logger.warning(f"train_sampling_strategy={order} needs rows that are known beforehand; a stream is shuffled")
    if args.early_stopping_patience:
        if values.get("load_best_model_at_end") is False:
            raise ValueError(
                "early_stopping_patience ends a run after its best checkpoint, but load_best_model_at_end is false; "
                "remove one of them"
            )
        if not values.keys() & {"eval_strategy", "eval_steps", "save_strategy", "save_steps"}:
            adapted["save_strategy"] = "epoch"  # every 500 steps, transformers' own, is beyond many runs
            logger.info("early_stopping_patience: the run evaluates and saves after each epoch, unless eval_steps says")
        adapted["load_best_model_at_end"] = True
        values = values | {"load_best_model_at_end": True, "save_strategy": adapted.get("save_strategy", "steps")}
    if args.eval_file is not None:
        adapted |= choose_evaluation(values)
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        adapted["ddp_backend"] = None  # one process has no others to speak with
    adapted.setdefault("report_to", "none")
    if values.get("save_strategy") == "best":
        adapted.setdefault("metric_for_best_model", "loss")
    return adapted


def choose_evaluation(values: dict[str, Any]) -> dict[str, Any]:
    """Choose when a run with an eval_file evaluates: every `eval_steps` if they are given, else after each epoch, or
    with `load_best_model_at_end` at each save.

    Raises:
        ValueError: `load_best_model_at_end` is set, and a checkpoint would be saved without an evaluation.
    """
    saves, every = values.get("save_strategy", "steps"), values.get("eval_steps")
    best = values.get("load_best_model_at_end")
    follows = best and every is None and saves in ("steps", "epoch")
    evaluates = values.get("eval_strategy") or ("steps" if every is not None else saves if follows else "epoch")
    if not best:
        return {"eval_strategy": evaluates}
    if "no" in (saves, evaluates) or saves not in ("best", evaluates):
        raise ValueError(
            "load_best_model_at_end needs an evaluation of every checkpoint, but eval_strategy is "
            f"{evaluates!r} and save_strategy {saves!r}; set both to 'steps' or both to 'epoch'"
        )
    if saves != "steps":
        return {"eval_strategy": evaluates}
    save_steps = values.get("save_steps", 500)  # transformers' default
    every = save_steps if every is None else every
    times = save_steps / every
    if (save_steps < 1) != (every < 1) or abs(times - max(round(times), 1)) > 1e-9:
        raise ValueError(
            f"load_best_model_at_end needs an evaluation of every checkpoint, but eval_steps is {every} and save_steps "
            f"{save_steps}, which is no multiple of it; set one of them so that it is"
        )
    return {"eval_strategy": evaluates, "eval_steps": every}


def check_card() -> None:
    """Raise ValueError for a card that torch is not built for: its first operation there would fail.

    Code for an architecture (sm_86) runs on cards of its generation from its minor version on, code that the driver
    compiles (compute_120) on all cards from then on (NVIDIA's CUDA programming guide).
    """
    import torch

    capability = torch.cuda.get_device_capability()
    built = [arch for arch in torch.cuda.get_arch_list() if arch.startswith(("sm_", "compute_"))]
    for arch in built:
        kind, version = arch.rstrip("af").split("_")
        since = divmod(int(version), 10)
        if since <= capability and (kind == "compute" or since[0] == capability[0]):
            return
    if built:
        remedy = (
            "torch's build for CUDA 12.6, which its releases up to 2.14 have"
            if capability < (7, 5)
            else "a newer torch"
        )
        raise ValueError(
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, but torch "
            f"{torch.__version__} is built for {', '.join(built)}; install {remedy} (docs/cards.md), or set use_cpu to "
            "true"
        )


def choose_compute_dtype(requested: str, values: dict[str, Any], has_cuda: bool) -> str:
    """Choose bfloat16, float16 or float32 by `compute_dtype`, the file's `bf16` and `fp16`, and what the card can do.

    Raises:
        ValueError: bfloat16 is asked for on a card without it, or `bf16` and `fp16` are both true.
    """
    import torch

    has_bf16 = has_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if values.get("bf16") and values.get("fp16"):
        raise ValueError("bf16 and fp16 are both true; keep one")
    asked = requested if requested != "auto" else "bfloat16" if values.get("bf16") else "auto"
    if not has_cuda:
        if asked == "bfloat16" and requested == asked:
            return asked
        if values.get("fp16") or asked not in ("auto", "float32"):
            logger.warning("half precision needs CUDA; computing in float32")
        return "float32"
    if asked == "bfloat16" and not has_bf16:
        raise ValueError(f"{torch.cuda.get_device_name()} has no bfloat16; set compute_dtype to float16")
    if asked != "auto":
        return asked
    if has_bf16 and values.get("fp16"):
        logger.info("fp16 is true, but this card has bfloat16: using that (compute_dtype=float16 forces fp16)")
    return "bfloat16" if has_bf16 else "float16"
