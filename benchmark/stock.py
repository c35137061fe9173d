"""Train by plain transformers and PEFT, from the settings file of the real command, for benchmark/scorecard.py.

There is a Trainer, a LoRA adapter, `resume_from_checkpoint` where there is a checkpoint, and nothing else.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    import component.chatglm  # noqa: F401  its classes, under the names of the Auto classes

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train_args_file", type=Path, required=True)
    settings = json.loads(parser.parse_args().train_args_file.read_text(encoding="utf-8"))
    known = {item.name for item in dataclasses.fields(TrainingArguments)}
    args = TrainingArguments(**{key: value for key, value in settings.items() if key in known}, report_to="none")

    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    samples = [
        {"input_ids": tokenizer(line)["input_ids"]}
        for line in Path(settings["train_file"]).read_text(encoding="utf-8").splitlines()
    ]

    def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(sample["input_ids"]) for sample in batch]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad(ids, batch_first=True, padding_value=-100),
        }

    set_seed(args.seed)
    lora = LoraConfig(
        r=settings["lora_rank"], lora_dropout=settings["lora_dropout"], target_modules=["query_key_value", "dense"]
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"]), lora)
    trainer = Trainer(model, args, data_collator=collate, train_dataset=samples)
    start = args.resume_from_checkpoint or (Path(args.output_dir).exists() and get_last_checkpoint(args.output_dir))
    print(f"continuing from {start}" if start else "training from the base model", flush=True)
    trainer.train(resume_from_checkpoint=start or None)
    trainer.save_state()
    trainer.save_model(str(Path(args.output_dir, "final")))


if __name__ == "__main__":
    main()
