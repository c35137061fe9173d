"""Train an adapter by plain transformers, PEFT and bitsandbytes, for docs/quality.md: what one would use instead.

python benchmark/plain_peft.py --train_args_file FILE [key=value ...]

It takes the settings file of train_qlora.py, whose batch, schedule, warm-up, optimizer and seed it gives to the stock
Trainer, and rows of OpenAI in one file. Prompts come from the tokenizer's chat template, padded to the longest of a
batch; answers alone are learned, up to their EOS. The adapter, with its tokenizer, is in `output_dir`/final.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def read_rows(path: str) -> list[dict]:
    """Rows with a call's arguments as an object, as templates want them."""
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    for message in (message for row in rows for message in row["messages"]):
        for call in message.get("tool_calls") or ():
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return rows


def make_sample(row: dict, tokenizer, max_length: int) -> dict[str, list[int]]:
    """Ids and labels of a row: -100 but for answers. An answer is what its message adds to the prompt before it."""
    messages, tools = row["messages"], row.get("tools")

    def render(count: int, ask: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(messages[:count], tools, tokenize=False, add_generation_prompt=ask)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = render(len(messages))
    labels = [-100] * len(ids)
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = len(render(place, ask=True)), len(render(place + 1))
            if tokenizer.eos_token_id in ids[start:end]:  # what follows it, such as a line break, is never generated
                end = start + ids[start:end].index(tokenizer.eos_token_id) + 1
            labels[start:end] = ids[start:end]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def main() -> None:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        Trainer,
        set_seed,
    )

    from component.chat_templates import set_chat_template
    from component.settings.load import load_arguments

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_args_file", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    cli = parser.parse_intermixed_args()
    args, training_args = load_arguments(cli.train_args_file, cli.overrides)
    training_args.eval_strategy, training_args.load_best_model_at_end = "no", False
    set_seed(training_args.seed)

    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    if args.chat_template:
        set_chat_template(tokenizer, args.chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    samples = [make_sample(row, tokenizer, args.max_seq_length) for row in read_rows(args.train_file)]

    dtype = getattr(torch, args.compute_dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path,
        quantization_config=quantization,
        dtype=dtype,
        device_map={"": training_args.device},
    )
    keeps_all = args.activation_checkpointing == "none"
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=not keeps_all)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.target_modules or "all-linear",
    )
    model = get_peft_model(model, lora)
    collator = DataCollatorForSeq2Seq(tokenizer)  # pads labels with -100, too
    trainer = Trainer(model, training_args, data_collator=collator, train_dataset=samples)
    trainer.train()
    final = Path(training_args.output_dir, "final")
    trainer.save_model(str(final))
    tokenizer.save_pretrained(final)


if __name__ == "__main__":
    main()
