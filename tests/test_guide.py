"""What the README leads a stranger through: an Instruct model learns functions, with a tiny model of Qwen2's kind."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from .component.data.test_chat_template import QWEN25

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## Teach an Instruct model your functions")[1].split("\n## ")[0]
ROWS = (ROOT / "data/functions_openai.jsonl").read_text(encoding="utf-8")


def make_instruct_model(folder: Path) -> Path:
    """Make a random model of Qwen2's layers, with a vocabulary of the sample rows and a template as Qwen2.5's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(ROWS.splitlines(), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<tool_call>", "</tool_call>")])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN25
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6}
    shape |= {"num_key_value_heads": 2, "vocab_size": 1024, "initializer_range": 0.06}
    ends = {"eos_token_id": tokenizer.token_to_id("<|im_end|>"), "pad_token_id": tokenizer.token_to_id("<|endoftext|>")}
    Qwen2ForCausalLM(Qwen2Config(**shape, **ends)).save_pretrained(folder)
    return folder


def test_the_row_that_is_shown_is_the_first_of_the_sample_file():
    row = re.search(r"```json\n(.*?)```", SECTION, re.DOTALL)[1]
    first = json.loads(ROWS.splitlines()[0])
    assert json.loads(row) == first | {"tools": first["tools"][:1]}  # the file has a second function


@pytest.mark.slow
def test_an_instruct_model_learns_functions_by_the_readme_alone(tmp_path):
    base, output = make_instruct_model(tmp_path / "Qwen2.5-7B-Instruct"), tmp_path / "output"
    changes = [f"model_name_or_path={base}", f"output_dir={output}", "learning_rate=3e-3", "lora_alpha=256"]
    changes += ["lora_dropout=0", "per_device_train_batch_size=4", "gradient_accumulation_steps=1"]
    changes += ["num_train_epochs=70", "lr_scheduler_type=cosine"]
    dry_run, train = re.findall(r"```bash\npython (.*?)\n```", SECTION)
    for command in (dry_run, train):
        words = [word for word in shlex.split(command) if not word.startswith("num_train_epochs=")]
        done = subprocess.run([sys.executable, *words, *changes], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    code = re.search(r"```python\n(.*?)```", SECTION, re.DOTALL)[1]
    code = code.replace("Qwen/Qwen2.5-7B-Instruct", str(base)).replace("output/qwen2.5-7b-instruct", str(output))
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE), shown.stderr
