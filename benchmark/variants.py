"""Training programs that benchmark/step.py measures. Each takes a Run and returns its figures.

An update is forward and backward of the same 64 samples, in 8 batches of 8, clipping, and one paged AdamW step in 32
bits. All updates are one epoch, as in most of a real run, but for programs that would mix the samples of several
updates: those that pack or group them have an epoch of one update.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import Trainer, TrainingArguments

from benchmark.common import AUTO, BATCH, LORA_ALPHA, LORA_RANK, Clock, Run, make_tokenizer, measure
from component.kernel.memory import GIB, Plan, choose_plan, estimate, fixed_bytes
from component.kernel.model import PackedForward
from component.train.batch import PackingCollator
from component.train.loss import TargetLMLoss
from component.train.trainer import LoRATrainer


def seed(run: Run, grouped: bool = False) -> dict:
    """Measure the recipe this project began with: padded, checkpointed, float32 norms and head, all tokens' logits."""
    model = run.model()
    clock = Clock(run)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    return train_plainly(run, get_peft_model(model, lora(0.05)), clock, checkpointing=True, grouped=grouped)


def plain(run: Run) -> dict:
    """Measure PEFT and transformers' Trainer as they come: padded, no checkpointing."""
    model = run.model()
    clock = Clock(run)
    return train_plainly(run, get_peft_model(model, lora(0.05)), clock, checkpointing=False)


def train_plainly(run: Run, model, clock: Clock, checkpointing: bool, grouped: bool = False) -> dict:
    key = "activation_checkpointing"  # called gradient_checkpointing before transformers 5.2x
    key = key if key in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
    settings = trainer_settings(run) | {key: checkpointing, "remove_unused_columns": False}
    if grouped:
        settings["train_sampling_strategy"] = "group_by_length"
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=run.samples() if grouped else run.epoch(),
        data_collator=partial(collate, pad_token_id=run.config.pad_token_id),
    )
    return measure(run, trainer, clock, checkpointing)


def collate(samples: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad samples on the right to (batch, length) tensors; labels are -100 where nothing is learned."""
    ids, masks = ([torch.tensor(sample[key]) for sample in samples] for key in ("input_ids", "target_mask"))
    labels = [torch.where(mask == 1, row, -100) for row, mask in zip(ids, masks, strict=True)]

    def pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ones = [torch.ones_like(row) for row in ids]
    return {"input_ids": pad(ids, pad_token_id), "attention_mask": pad(ones, 0), "labels": pad(labels, -100)}


def lora(dropout: float) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=dropout, target_modules="all-linear"
    )


def trainer_settings(run: Run) -> dict:
    """TrainingArguments that all programs are given."""
    cuda = run.device.type == "cuda"
    samples = len(run.samples())
    batch = max(size for size in range(1, BATCH + 1) if samples % size == 0)
    return {
        "output_dir": str(run.folder / run.variant),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": samples // batch,
        "train_sampling_strategy": "sequential",
        "max_steps": run.steps,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "optim": "paged_adamw_32bit" if cuda else "adamw_torch",
        "bf16": cuda,
        "use_cpu": not cuda,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def trl(run: Run, checkpointing: bool) -> dict:
    """Measure TRL's SFTTrainer over a 4-bit model, padded."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    samples = run.epoch()
    labels = [
        [token if learned else -100 for token, learned in zip(sample["input_ids"], sample["target_mask"], strict=True)]
        for sample in samples
    ]
    model = run.model()
    clock = Clock(run)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**trainer_settings(run), max_length=run.longest, gradient_checkpointing=checkpointing),
        train_dataset=Dataset.from_dict(
            {"input_ids": [sample["input_ids"] for sample in samples], "labels": labels},
        ),
        processing_class=make_tokenizer(run),
        peft_config=lora(0.05),
    )
    return measure(run, trainer, clock, checkpointing)


def unsloth(run: Run, dropout: float = 0.0, packing: bool = False) -> dict:
    """Measure Unsloth's loader and adapter under TRL's SFTTrainer, which it replaces when imported; no checkpointing.

    step.py imports it before anything of transformers, as it asks for, and saves the checkpoint. With packing, a row
    is as many samples as fit in the longest one's length, and the batches of 8 rows still make one update.

    Raises:
        ValueError: it fell back to padding.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(checkpoint_folder(run)), max_seq_length=run.longest, dtype=run.dtype, load_in_4bit=True
    )
    clock = Clock(run)
    model = FastLanguageModel.get_peft_model(
        model,
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=dropout,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=False,
        random_state=0,
    )
    batching = {"packing": True} if packing else {"padding_free": True}
    # With labels it would put a padding collator in place of TRL's; it makes them of this mask.
    samples = run.samples() if packing else run.epoch()
    samples = [{"input_ids": row["input_ids"], "completion_mask": row["target_mask"]} for row in samples]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **trainer_settings(run),
            **batching,
            max_length=run.longest,
            completion_only_loss=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(samples),
        processing_class=tokenizer,
    )
    if not getattr(trainer.data_collator, "padding_free", False):  # it falls back to padding with no more than a note
        raise ValueError(f"Unsloth pads here: its collator is {trainer.data_collator}")
    return measure(run, trainer, clock, checkpointing=False)


def luciole(
    run: Run, checkpointing: str = "none", dropout: float = 0.05, rows: int | str = 8192, bits: int = 4
) -> dict:
    """Measure this project's own step: packed rows, fused layers, the loss of learned tokens alone.

    Args:
        checkpointing: what layers keep for their backward; auto for what a run chooses.
        rows: tokens of a packed row at most, or AUTO. The longest sample always fits.
    """
    model = run.model(bits)
    clock = Clock(run)
    model = get_peft_model(model, lora(dropout))
    forward = PackedForward(model, run.longest)
    rows = run.rows or rows
    tokens = None if rows == AUTO else max(rows, run.longest)
    plan = choose_plan(forward, tokens, checkpointing, run.longest, optimizer_bytes=0, samples=len(run.samples()))
    clock.forget_memory()  # of plans that were tried
    trainer = LoRATrainer(
        model=model,
        args=TrainingArguments(**trainer_settings(run)),
        train_dataset=run.epoch(),
        data_collator=PackingCollator(plan.tokens),
        loss=TargetLMLoss(),
    )
    runs_twice = plan.checkpointing in ("full", "offload")
    return measure(run, trainer, clock, runs_twice, count_learned) | describe_plan(forward, plan)


def describe_plan(forward: PackedForward, plan: Plan) -> dict:
    """The rows of a plan, what it keeps, and its memory by estimate, with the optimizer's state on the host."""
    size = estimate(forward.layers, forward.vocab, fixed_bytes(forward, optimizer_bytes=0), plan)
    return {
        "rows": plan.tokens,
        "kept": plan.checkpointing + ", weights" * plan.keeps_weights,
        "estimate_gib": size / GIB,
    }


def count_learned(trainer: LoRATrainer) -> int:
    """Learned tokens of the trainer's first update."""
    update = next(trainer.updates.of_epoch(0, 0))
    return sum(map(trainer.count_learned, chain.from_iterable(update.batches)))


def checkpoint_folder(run: Run) -> Path:
    return run.folder / "checkpoint" / run.shape


# Name to (shape unless --shape gives another, function).
VARIANTS: dict[str, tuple[str, Callable[[Run], dict]]] = {
    "luciole": ("chatglm3-6b", luciole),
    "luciole-16bit": ("chatglm3-6b", partial(luciole, bits=16)),
    "luciole-selective": ("chatglm3-6b", partial(luciole, checkpointing="selective")),
    "luciole-full": ("chatglm3-6b", partial(luciole, checkpointing="full")),
    "luciole-offload": ("chatglm3-6b", partial(luciole, checkpointing="offload")),
    "luciole-small": ("chatglm3-6b", partial(luciole, checkpointing="offload", rows=2048)),
    "luciole-auto": ("chatglm3-6b", partial(luciole, checkpointing="auto", rows=AUTO)),
    "luciole-llama-d05": ("llama-16", partial(luciole, checkpointing="auto", rows=AUTO)),
    "luciole-llama-d0": ("llama-16", partial(luciole, checkpointing="auto", rows=AUTO, dropout=0.0)),
    "seed": ("chatglm3-6b", seed),
    "seed-grouped": ("chatglm3-6b", partial(seed, grouped=True)),
    "plain": ("chatglm3-6b", plain),
    "trl-glm": ("glm-6b", partial(trl, checkpointing=True)),
    "trl": ("llama-16", partial(trl, checkpointing=True)),
    "trl-nockpt": ("llama-16", partial(trl, checkpointing=False)),
    "unsloth-d05": ("llama-16", partial(unsloth, dropout=0.05)),
    "unsloth-d0": ("llama-16", unsloth),
    "unsloth-packing": ("llama-16", partial(unsloth, packing=True)),
}
for name, shape in {"qwen": "qwen-0.5b", "smol": "smollm2-135m"}.items():  # small models
    VARIANTS |= {
        f"luciole-{name}-d05": (shape, partial(luciole, checkpointing="auto", rows=AUTO)),
        f"luciole-{name}-d0": (shape, partial(luciole, checkpointing="auto", rows=AUTO, dropout=0.0)),
        f"trl-{name}-nockpt": (shape, partial(trl, checkpointing=False)),
        f"unsloth-{name}-d05": (shape, partial(unsloth, dropout=0.05)),
        f"unsloth-{name}-packing": (shape, partial(unsloth, packing=True)),
    }
