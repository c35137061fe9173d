"""Fine-tune a chat model with QLoRA from one JSON file.

python train_qlora.py --train_args_file FILE [--dry_run] [key=value ...]
torchrun --nproc_per_node=N train_qlora.py --train_args_file FILE
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path

from component.run.process import run_program
from component.settings.load import load_arguments
from component.settings.schema import QLoRAArguments

PICTURE = "loss.png"


class Parser(argparse.ArgumentParser):
    """A parser that hides secrets in its errors, since these repeat what was typed."""

    def error(self, message: str):
        from component.run.log import redact  # imports torch, which --help need not wait for

        super().error(redact(message))


def parse_command_line() -> argparse.Namespace:
    parser = Parser(
        description=__doc__, epilog=describe_settings(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train_args_file", required=True, metavar="FILE", help="JSON file with the settings")
    parser.add_argument(
        "--dry_run", action="store_true", help="show settings, one sample and the steps; load no weights"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    return parser.parse_intermixed_args()


def describe_settings() -> str:
    lines = ["settings of our own, beside those of Hugging Face TrainingArguments (docs/configuration.md):"]
    for setting in dataclasses.fields(QLoRAArguments):
        default = "" if setting.default in ("", None) else f" [{setting.default}]"
        lines.append(f"  {setting.name}{default}\n      {setting.metadata['help']}")
    return "\n".join(lines)


def train(cli: argparse.Namespace, watch) -> None:
    # torch and transformers take seconds to import, which --help need not wait for.
    from loguru import logger

    from component.data.dataset import check_choice, select_format, warn_of_endless_answers
    from component.model import check_beginning, check_bits, load_tokenizer, warn_of_cpu
    from component.run.folder import RunFolder, foresee_start
    from component.run.ranks import on_every_rank, on_rank_zero, require_same
    from component.run.resume import FINAL
    from component.train.identity import describe_format, describe_machine, describe_run, renew_identity
    from component.train.report import describe_update
    from component.trust import identify_base, require_weights

    args, training_args = load_arguments(cli.train_args_file, cli.overrides, on_every_rank)
    data_format, reason = on_every_rank(
        lambda: select_format(args.model_name_or_path, args.data_format, args.chat_template)
    )
    logger.info(f"model {args.model_name_or_path}, data format {data_format}: {reason}")
    if not os.path.isdir(args.model_name_or_path):
        logger.info(f"no folder {args.model_name_or_path} in {os.getcwd()}: asking the hub for it")
    tokenizer = on_every_rank(lambda: load_tokenizer(args))
    on_rank_zero(lambda: check_bits(args.model_name_or_path, args.base_bits))
    on_rank_zero(lambda: check_choice(args, data_format, tokenizer))
    on_rank_zero(lambda: warn_of_endless_answers(data_format, tokenizer))
    on_rank_zero(lambda: warn_of_cpu(args))
    if args.adapter_name_or_path:
        name, prompts = args.model_name_or_path, describe_format(data_format, tokenizer)
        on_every_rank(lambda: check_beginning(args, identify_base(name), prompts))
    begin = (training_args.resume_from_checkpoint, args.overwrite_output_dir, args.resume_despite_changes)

    def identify() -> dict:
        return describe_run(args, training_args, data_format, tokenizer)

    if cli.dry_run:
        show_run(args, training_args, data_format, tokenizer)
        first = on_rank_zero(lambda: foresee_start(training_args.output_dir, identify, renew_identity, *begin))
        logger.log("WARNING" if "refused" in first else "INFO", f"a run {first}")
        return
    on_every_rank(lambda: require_weights(args.model_name_or_path))
    if args.score_at_end:
        from component.score.at_end import check_eval_rows

        on_rank_zero(lambda: check_eval_rows(args, data_format))  # before anything is trained
    require_same(
        lambda: describe_machine(args, training_args, tokenizer),
        remedy="give every machine the same settings and the same files",
    )
    logger.info(describe_update(training_args))
    with RunFolder(training_args.output_dir, on_rank_zero(identify), renew_identity) as folder:
        on_rank_zero(folder.acquire)
        folder.check_shared()
        start = on_rank_zero(lambda: folder.open(*begin))
        if start.is_done:
            logger.info(f"this run is done: {folder.path / FINAL}; overwrite_output_dir=true begins it anew")
            model = None
        else:
            model = fine_tune(args, training_args, data_format, tokenizer, folder, start, watch)
        if args.score_at_end:
            cli.if_stopped = (
                f"stopped while scoring; the final adapter is whole: {folder.path / FINAL}; the same command scores it "
                "again"
            )
            watch.end_deferral()  # nothing is left to be saved
            score_at_end(args, data_format, tokenizer, folder.path, model)


def fine_tune(args, training_args, data_format: str, tokenizer, folder, start, watch):
    """Train from the data to the final adapter, in a folder that this run has locked. Returns the trained model."""
    from loguru import logger

    from component.data.cache import limit_cache
    from component.data.dataset import DATA_FORMATS
    from component.data.load import load_datasets, require_stores
    from component.kernel.memory import PADDED
    from component.run.ranks import on_each_machine, on_every_rank, on_rank_zero
    from component.train.batch import PackingCollator, SFTDataCollator
    from component.train.loss import TargetLMLoss
    from component.train.report import describe_schedule, describe_ways
    from component.train.trainer import LoRATrainer

    # 1. Data
    train_dataset, eval_dataset = on_rank_zero(
        lambda: load_datasets(
            args,
            DATA_FORMATS[data_format],
            tokenizer,
            training_args.seed,
            output_dir=folder.path,
            goes_on=bool(start.checkpoint),
        )
    )
    on_each_machine(lambda: require_stores(train_dataset, eval_dataset))
    on_each_machine(lambda: limit_cache(args.cache_dir, args.cache_size_limit))
    rows = None if args.streaming else len(train_dataset)
    logger.info(on_rank_zero(lambda: describe_schedule(rows, training_args)))

    # 2. Model
    model = on_every_rank(lambda: make_model(args, training_args, folder, start))

    # 3. Layout: the length of rows, and what layers keep for backward. A run that goes on keeps its layout.
    forward, plan = choose_layout(model, args, training_args, begun_with=start.plan)
    folder.plan = dataclasses.asdict(plan)
    padded = plan.tokens == PADDED
    collator = SFTDataCollator(tokenizer, args.max_seq_length) if padded else PackingCollator(plan.tokens)

    # 4. Training
    trainer = LoRATrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=make_callbacks(args, folder.path / PICTURE),
        loss=TargetLMLoss(),
        folder=folder,
        watch=watch,
        max_skipped_updates=args.max_skipped_updates,
    )
    on_rank_zero(lambda: folder.check_room(trainer.checkpoints.size()))
    beginning = args.adapter_name_or_path or "the base model"
    logger.info(f"continuing from {start.checkpoint}" if start.checkpoint else f"training from {beginning}")
    if forward.layers:
        optimizer, _ = trainer.get_optimizer_cls_and_kwargs(training_args, model)
        logger.info(describe_ways(forward, optimizer))
    result = trainer.train(resume_from_checkpoint=start.checkpoint)

    # 5. Results
    publish_results(trainer, result, folder, start)
    forward.leave()  # so that weights kept unpacked and CUDA graphs leave their memory to a score
    return trainer.model


def make_model(args, training_args, folder, start):
    """Load the base and attach the adapter: a new one, or the one to begin from. A checkpoint's comes later."""
    import torch
    from loguru import logger
    from transformers import set_seed

    from component.model import attach_lora, begin_from_adapter, bits_in_memory, load_model
    from component.run.errors import ArgumentError
    from component.train.identity import describe_adapter
    from component.train.report import parameter_table

    bits = bits_in_memory(args.base_bits, getattr(torch, args.compute_dtype))
    logger.info(
        f"loading {args.model_name_or_path} in {bits} bits on {training_args.device}, {args.compute_dtype} arithmetic"
    )
    set_seed(training_args.seed)
    model = attach_lora(load_model(args, training_args), args)
    if args.adapter_name_or_path and not start.checkpoint:
        begin_from_adapter(model, args.adapter_name_or_path)
        if describe_adapter(args) != folder.identity["adapter"]:
            raise ArgumentError(f"{args.adapter_name_or_path}: its weights changed while the run began; start it again")
    logger.info(f"parameters\n{parameter_table(model)}")
    return model


def choose_layout(model, args, training_args, begun_with: dict | None):
    """Choose the plan that was asked for, or the fastest that fits. Returns the model's new forward, and the plan to
    which it is set."""
    from component.kernel.memory import PADDED, choose_plan, optimizer_bytes
    from component.kernel.model import PackedForward

    asked = begun_with or {"tokens": args.packing_length, "checkpointing": args.activation_checkpointing}
    forward = PackedForward(model, args.max_seq_length, fuses=args.packing and args.fused_layers)
    plan = choose_plan(
        forward,
        **asked,
        longest=args.max_seq_length,
        optimizer_bytes=optimizer_bytes(training_args.optim, on_card=True),
        packing=args.packing and asked["tokens"] != PADDED,
        samples=samples_of_rank(training_args),
        goes_on=begun_with is not None,
    )
    return forward, plan


def samples_of_rank(training_args) -> int:
    """Samples of an update on one rank."""
    return training_args.train_batch_size * training_args.gradient_accumulation_steps


def make_callbacks(args, picture: Path) -> list:
    from component.train.early_stopping import EarlyStopping
    from component.train.progress import LossPicture

    patience, threshold = args.early_stopping_patience, args.early_stopping_threshold
    return [LossPicture(picture), *([EarlyStopping(patience, threshold)] if patience else [])]


def publish_results(trainer, result, folder, start) -> None:
    """Write figures and picture, and last the final adapter, which marks the run as done."""
    from loguru import logger

    from component.run.ranks import on_rank_zero
    from component.run.resume import step_of

    picture, figures = folder.path / PICTURE, folder.path / "trainer_state.json"
    on_rank_zero(folder.check_lock)
    on_rank_zero(lambda: write_results(trainer.state, figures, picture))
    final = trainer.save_final()
    begun = step_of(Path(start.checkpoint)) if start.checkpoint else 0
    now = f", {result.global_step - begun} of them now" if begun else ""
    logger.info(f"done: {result.global_step} steps{now}, in {result.metrics['train_runtime']:.0f} s{peak_memory()}")
    logger.info(f"adapter and tokenizer: {final}")
    logger.info(f"loss curve: {picture}; its figures: {figures}")


def score_at_end(args, data_format: str, tokenizer, folder: Path, model) -> None:
    """Score the final adapter on rank 0: in the model that was trained or, if that is None, loaded anew unless it has
    a score."""
    from component.run.ranks import on_rank_zero
    from component.score.at_end import is_scored, score_run, session_of

    def score() -> str:
        if model is None and is_scored(folder):
            return ""
        return score_run(args, lambda: session_of(args, data_format, tokenizer, folder, model), folder)

    shown = on_rank_zero(score)
    if shown and not int(os.environ.get("RANK") or 0):
        print(shown)


def write_results(state, figures: Path, picture: Path) -> None:
    from component.run.errors import StorageError
    from component.run.files import write_atomically
    from component.train.report import plot_loss

    try:
        write_atomically(figures, json.dumps(dataclasses.asdict(state), indent=2).encode())
    except OSError as error:
        raise StorageError(
            f"{figures} could not be written ({error}); mend this and start the same command again, which then only "
            "writes the results"
        ) from None
    plot_loss(state.log_history, picture)


def peak_memory() -> str:
    import torch

    if not torch.cuda.is_available():
        return ""
    return f", at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory"


def show_run(args, training_args, data_format: str, tokenizer) -> None:
    """Print a run's settings, one sample, the estimated memory, and the number of updates. Nothing is trained."""
    from component.data.dataset import DATA_FORMATS
    from component.data.load import load_datasets
    from component.kernel.memory import list_plans, optimizer_bytes, possible_plans
    from component.kernel.model import PackedForward
    from component.model import sketch_model
    from component.run.ranks import on_rank_zero
    from component.train.report import describe_schedule, describe_update, render_sample
    from component.train.updates import count_steps

    train_dataset, _ = on_rank_zero(
        lambda: load_datasets(args, DATA_FORMATS[data_format], tokenizer, training_args.seed, output_dir=None)
    )
    if int(os.environ.get("RANK") or 0):
        return
    show_settings(args, training_args)
    sample = train_dataset.first_sample() if args.streaming else train_dataset[0]
    print(f"\nOne sample, its learned tokens marked:\n\n{render_sample(sample, tokenizer)}\n")
    forward = PackedForward(sketch_model(args), args.max_seq_length, fuses=args.packing and args.fused_layers)
    if forward.layers:
        samples = samples_of_rank(training_args)
        plans = possible_plans(args.packing_length, args.activation_checkpointing, args.max_seq_length, samples)
        print(f"{list_plans(forward, plans, optimizer_bytes(training_args.optim, on_card=True))}\n")
    rows = None if args.streaming else len(train_dataset)
    print(f"{describe_update(training_args)}\n{describe_schedule(rows, training_args)}")
    print(f"{count_steps(rows, training_args)} steps. No weights were loaded.")


def show_settings(args, training_args) -> None:
    """Print the required settings, and those that differ from a run with the required ones alone."""
    required = {"model_name_or_path": args.model_name_or_path, "train_file": args.train_file}
    required |= {"output_dir": training_args.output_dir}
    plain = values_of(*load_arguments(None, [f"{key}={json.dumps(value)}" for key, value in required.items()]))
    given = {key: value for key, value in values_of(args, training_args).items() if value != plain[key]}
    print("Settings; all others are as docs/configuration.md says:")
    for key, value in (required | dict(sorted(given.items()))).items():
        print(f"  {key:<30}{json.dumps(value, ensure_ascii=False, default=str)}")


def values_of(args, training_args) -> dict:
    return training_args.to_dict() | dataclasses.asdict(args)


def main() -> None:
    cli = parse_command_line()
    cli.if_stopped = "stopped before training; the same command starts it"  # until there is something else to say
    run_program(lambda watch: train(cli, watch), lambda: cli.if_stopped, int(os.environ.get("RANK") or 0))


if __name__ == "__main__":
    main()
