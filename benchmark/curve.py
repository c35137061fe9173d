"""Compare the loss curves of the fast step and of a plain one over seeds: whether they learn the same.

python benchmark/curve.py --model FOLDER [--gguf FILE] --data FILE --output FOLDER [--steps 200] [--seeds 0 1 2]

Fast is `train_qlora.py` as it comes. Plain is PEFT and transformers' Trainer: padded batches, float32 throughout. Both
have one 4-bit base, one adapter to start from, and the same rows in every update; their dropouts differ. The noise is
the deviation of the plain curves of different seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmark.runs import logged

WINDOW = 10  # steps that a figure of the table is the mean of
SETTINGS = {
    "data_format": "firefly",
    "max_seq_length": 1024,
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "max_grad_norm": 0.3,
    "lora_rank": 64,
    "logging_steps": 1,
    "save_strategy": "no",
    "optim": "adamw_torch",
    "disable_tqdm": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gguf", help="the folder's model is this file")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    cli = parser.parse_args()
    cli.output.mkdir(parents=True, exist_ok=True)
    model = unpack(cli.model, cli.gguf, cli.output / "model") if cli.gguf else cli.model
    settings = SETTINGS | {
        "model_name_or_path": str(model.resolve()),
        "train_file": str(cli.data.resolve()),
        "max_steps": cli.steps,
    }
    curves = {}
    for seed in cli.seeds:
        for name, train in (("fast", train_fast), ("plain", train_plain)):
            folder = str(cli.output.resolve() / f"{name}-{seed}")
            curves[name, seed] = train(settings | {"seed": seed, "output_dir": folder})
            found = {f"{kind} {number}": curve for (kind, number), curve in curves.items()}
            (cli.output / "curves.json").write_text(json.dumps(found))
    report(curves, cli.seeds)


def unpack(folder: Path, gguf: str, target: Path) -> Path:
    """Make a checkpoint of transformers of a GGUF model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf)
    model.hf_quantizer = None  # its weights are float32 by now, and may be saved
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(target)
    return target


def train_fast(settings: dict) -> list[float]:
    file = Path(f"{settings['output_dir']}.json")
    file.write_text(json.dumps(settings), encoding="utf-8")
    subprocess.run([sys.executable, ROOT / "train_qlora.py", "--train_args_file", file], cwd=ROOT, check=True)
    return logged(Path(settings["output_dir"]), "loss")


def train_plain(settings: dict) -> list[float]:
    from transformers import Trainer, set_seed

    from benchmark.variants import collate
    from component.data.dataset import select_dataset
    from component.model import attach_lora, load_model, load_tokenizer
    from component.settings.load import load_arguments

    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    args, training_args = load_arguments(None, [*overrides, "compute_dtype=float32"])
    tokenizer = load_tokenizer(args)
    samples = select_dataset("", args.data_format)(args.train_file, tokenizer, args.max_seq_length)
    set_seed(training_args.seed)
    model = attach_lora(load_model(args, training_args), args)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=samples,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def report(curves: dict[tuple[str, int], list[float]], seeds: list[int]) -> None:
    smooth = {key: [statistics.fmean(c[i : i + WINDOW]) for i in range(0, len(c), WINDOW)] for key, c in curves.items()}
    print(f"{'steps':<12}{'fast':>9}{'plain':>9}{'difference':>12}{'noise':>9}   means of seeds and {WINDOW} steps")
    for i in range(len(smooth["fast", seeds[0]])):
        fast, plain = ([smooth[name, seed][i] for seed in seeds] for name in ("fast", "plain"))
        difference = statistics.fmean(a - b for a, b in zip(fast, plain, strict=True))
        noise = statistics.stdev(plain) if len(seeds) > 1 else 0.0
        span = f"{i * WINDOW + 1}-{(i + 1) * WINDOW}"
        means = f"{statistics.fmean(fast):>9.4f}{statistics.fmean(plain):>9.4f}"
        print(f"{span:<12}{means}{difference:>+12.4f}{noise:>9.4f}")
    paired = [a - b for seed in seeds for a, b in zip(curves["fast", seed], curves["plain", seed], strict=True)]
    print(f"mean difference over all steps {statistics.fmean(paired):+.4f}, of one step {statistics.stdev(paired):.4f}")


if __name__ == "__main__":
    main()
