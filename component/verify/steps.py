"""What must hold of a published ChatGLM, step by step: files, losses, a function call, ten updates of training."""

import gc
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from loguru import logger

from ..chatglm import ChatGLMForConditionalGeneration
from ..chatglm.prompt import TOOLS_PROMPT
from ..data.conversation import Conversation
from ..data.dataset import DATA_FORMATS, last_part
from ..model import load_adapter, load_model, load_tokenizer, sketch_base
from ..run.errors import ArgumentError, Fault
from ..run.manifest import sha256
from ..run.resume import FINAL
from ..settings.load import load_arguments, read_json_object
from ..train.checkpoint import STATE
from ..train.loss import TargetLMLoss
from ..trust import find_model_file, find_weights, read_model_json, read_shapes, require_weights
from . import facts
from .lessons import ask, find_lessons, shorten, taught_answer
from .wirings import wrong_wirings

ROOT = Path(__file__).parents[2]
UPDATES = 10
LISTED = 10  # tensors that are not as they must be, or last lines of a log
LARGEST_LEAK = 0.1  # of a logit, which may differ only where a card adds up in another order each time
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


class StepsFailed(Fault):
    """Some steps failed, as the report says."""

    exit_code = 1


class Failed(Exception):
    """Raised by a step with the figures that are not as they must be."""


class Skipped(Exception):
    """Raised by a step that does not apply to this model or cannot be taken, with the reason."""


@dataclass(frozen=True)
class Finding:
    step: str
    result: str  # PASSED, FAILED or SKIPPED
    figures: str
    seconds: float


class Verification:
    """The steps for one model. Each returns its figures as text, or raises Failed or Skipped.

    Args:
        name_or_path: folder or hub name of a ChatGLM2 or ChatGLM3.
        folder: an empty one, for the run of training.
        base_bits: with which the model is trained and asked.

    Raises:
        ArgumentError: the folder is no ChatGLM, or is not all there; the faults are those of training.
    """

    def __init__(self, name_or_path: str, folder: Path, base_bits: int = 4):
        self.sketch = sketch_base(name_or_path)
        config = self.sketch.config
        if not isinstance(self.sketch, ChatGLMForConditionalGeneration):
            raise ArgumentError(f"{name_or_path}: model_type is {config.model_type!r}; only ChatGLM2 and 3 are checked")
        require_weights(name_or_path)
        self.name = last_part(name_or_path)
        recorded = read_model_json(find_model_file(name_or_path, "config.json")).get("_name_or_path", "")
        names = f"{self.name} {recorded}".lower()
        self.speaks = f"chatglm{config.chatglm_version}"
        self.calls = self.speaks == "chatglm3" and "base" not in names
        long = "-32k" * (self.speaks == "chatglm3" and "32k" in names)
        self.settings_file = ROOT / f"train_args/qlora/{self.speaks}-6b{long}-sft-qlora.json"
        self.data = ROOT / read_json_object(self.settings_file)["train_file"]
        self.output_dir = folder / "run"
        settings = {
            "model_name_or_path": name_or_path,
            "train_file": self.data,
            "data_format": self.speaks,
            "base_bits": base_bits,
            "output_dir": self.output_dir,
            "cache_dir": folder / "cache",
            "max_steps": UPDATES,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        }
        self.overrides = [f"{key}={value}" for key, value in settings.items()]
        self.args, self.training_args = load_arguments(self.settings_file, self.overrides)
        self.tokenizer = load_tokenizer(self.args)
        self.tensors_fit = False

    def run(self) -> Iterator[Finding]:
        """Take the steps one after another, whatever became of those before."""
        steps: dict[str, Callable[[], str]] = {
            "tensors": self.check_tensors,
            "tokenizer file": self.check_tokenizer_file,
            "token ids": self.check_token_ids,
            "loss of plain text": self.check_loss,
            "wiring": self.check_wiring,
            "function call": self.check_call,
            f"{UPDATES} updates of training": self.check_training,
            "chat before and after": self.check_lessons,
        }
        for step, check in steps.items():
            logger.info(f"step: {step}")
            began = time.monotonic()
            try:
                result, figures = PASSED, check()
            except Skipped as reason:
                result, figures = SKIPPED, str(reason)
            except Failed as failure:
                result, figures = FAILED, str(failure)
            except Exception as error:  # of any library: what goes wrong with real weights is what is asked here
                result, figures = FAILED, f"{type(error).__name__}: {error}"
            yield Finding(step, result, figures, time.monotonic() - began)

    def check_tensors(self) -> str:
        """Compare names and shapes of the tensors with those that follow from config.json."""
        found, files = {}, []
        for file in find_weights(self.args.model_name_or_path):
            found |= read_shapes(file)
            files.append(f"{sha256(file)}  {file.stat().st_size:>13,}  {file.name}")
        expected = {name: list(tensor.shape) for name, tensor in self.sketch.state_dict().items()}
        allowed = re.compile("|".join(self.sketch._keys_to_ignore_on_load_unexpected))
        unexpected = [name for name in found if name not in expected and not allowed.search(name)]
        misshapen = [name for name, shape in expected.items() if found.get(name, shape) != shape]
        faults = [
            *(f"missing: {name} {shape}" for name, shape in expected.items() if name not in found),
            *(f"unexpected: {name} {found[name]}" for name in unexpected),
            *(f"wrong shape: {name} {found[name]}, expected {expected[name]}" for name in misshapen),
        ]
        if faults:
            rest = [f"and {len(faults) - LISTED} more"] * (len(faults) > LISTED)
            raise Failed("\n".join([*faults[:LISTED], *rest, *files]))
        self.tensors_fit = True
        config = self.sketch.config
        shape = f"{config.num_layers} layers of {config.hidden_size}, rope_ratio {config.rope_ratio:g}"
        return "\n".join([f"{len(expected)} tensors, {self.sketch.num_parameters():,} weights, {shape}", *files])

    def check_tokenizer_file(self) -> str:
        found = sha256(Path(self.tokenizer.vocab_file))
        if found != facts.TOKENIZER:
            raise Failed(f"sha256 of tokenizer.model is {found}, the official one's is {facts.TOKENIZER}")
        return f"tokenizer.model is the official one, sha256 {found}"

    def check_token_ids(self) -> str:
        """Compare the ids of some texts, and of a question, with those of the official tokenizer."""
        found = {text: self.tokenizer.encode(text, add_special_tokens=False) for text in facts.IDS}
        found["the question 你好"] = self.tokenizer.build_chat_input("你好")["input_ids"][0].tolist()
        expected = facts.IDS | {"the question 你好": facts.CHAT}
        wrong = [f"{text!r}: {found[text]}, expected {ids}" for text, ids in expected.items() if found[text] != ids]
        if wrong:
            raise Failed("\n".join(wrong))
        return f"{len(facts.IDS)} texts and a question have the official ids"

    @cached_property
    def model(self) -> ChatGLMForConditionalGeneration:
        """The model as training loads it: in base_bits."""
        self.require_tensors()
        return load_model(self.args, self.training_args).eval()

    def require_tensors(self) -> None:
        if not self.tensors_fit:
            raise Skipped("the tensors are not those of the architecture")

    @torch.no_grad()
    def mean_loss(self, model, input_ids: list[int], target_mask: list[int]) -> float:
        """Loss in nats for each learned token."""
        ids, mask = (torch.tensor([values], device=model.device) for values in (input_ids, target_mask))
        return TargetLMLoss()(model(ids).logits, ids, mask).item() / sum(target_mask)

    def losses_of_texts(self, prefix: list[int]) -> dict[str, float]:
        """Loss of the text of each language after the prefix. Its first token does not count."""
        losses = {}
        for language, text in facts.TEXTS.items():
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            target_mask = [0] * (len(prefix) + 1) + [1] * (len(ids) - 1)
            losses[language] = self.mean_loss(self.model, prefix + ids, target_mask)
        return losses

    def check_loss(self) -> str:
        losses = self.losses_of_texts(self.tokenizer.get_prefix_tokens())
        shown = ", ".join(f"{language} {loss:.3f}" for language, loss in losses.items())
        random = math.log(self.sketch.config.vocab_size)
        shown += f" nats a token; must be below {facts.LARGEST_LOSS} (random weights: {random:.2f})"
        if not all(loss < facts.LARGEST_LOSS for loss in losses.values()):
            raise Failed(shown)
        return shown

    def check_wiring(self) -> str:
        """Compare the loss with those of wrong wirings, which must be higher, and see that no token sees later ones."""
        prefix = self.tokenizer.get_prefix_tokens()
        wirings = {"as published": nullcontext(), **wrong_wirings(self.model)}
        losses = {}
        for name, wiring in wirings.items():
            with wiring:
                losses[name] = statistics.mean(self.losses_of_texts(prefix).values())
        losses["without [gMASK] sop"] = statistics.mean(self.losses_of_texts([]).values())
        leak = self.leak()
        shown = [f"{loss:8.3f}  {name}" for name, loss in sorted(losses.items(), key=lambda item: item[1])]
        shown.append(f"{leak:8.1e}  largest change of a logit by a later token")
        right = losses.pop("as published")
        if not (leak < LARGEST_LEAK and all(right < loss for loss in losses.values())):
            raise Failed("\n".join(["as published must be the lowest, and the change 0", *shown]))
        return "\n".join(shown)

    @torch.no_grad()
    def leak(self) -> float:
        """Largest difference that other tokens in a text's second half make to the logits of its first half."""
        ids = self.tokenizer(facts.TEXTS["English"], return_tensors="pt")["input_ids"].to(self.model.device)
        first, second = ids.chunk(2, dim=1)
        others = torch.cat((first, second.flip(1)), dim=1)
        one, other = (self.model(values).logits[:, : first.shape[1]].float() for values in (ids, others))
        return (one - other).abs().max().item()

    def check_call(self) -> str:
        """Offer functions, take the call, give its result, and look for the result in the answer."""
        if not self.calls:
            raise Skipped("ChatGLM2 and base models were not taught to call functions")
        history = [{"role": "system", "content": TOOLS_PROMPT, "tools": facts.TOOLS}]
        settings = {"do_sample": False, "max_new_tokens": 128}
        call, history = self.model.chat(self.tokenizer, facts.QUESTION, history=history, **settings)
        shown = f"user         {facts.QUESTION}\nmodel        {shorten(call)}"
        if not isinstance(call, dict) or call["name"] != facts.FUNCTION:
            raise Failed(f"{shown}\nexpected a call of {facts.FUNCTION}")
        if not any(facts.PLACE in str(value) for value in call.get("parameters", {}).values()):
            raise Failed(f"{shown}\nexpected a parameter with {facts.PLACE}")
        result = json.dumps(facts.RESULT, ensure_ascii=False)
        answer, _ = self.model.chat(self.tokenizer, result, history=history, role="observation", **settings)
        shown += f"\nobservation  {result}\nmodel        {shorten(answer)}"
        if facts.FIGURE not in str(answer):
            raise Failed(f"{shown}\nexpected an answer with {facts.FIGURE}")
        return shown

    def check_training(self) -> str:
        """Train by the real command with the shipped settings, on the sample data."""
        self.require_tensors()
        vars(self).pop("model", None)  # the run needs its memory
        gc.collect()
        torch.cuda.empty_cache()
        command = [sys.executable, ROOT / "train_qlora.py", "--train_args_file", self.settings_file, *self.overrides]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        log = [line.partition(" INFO    ")[2] or line for line in done.stderr.splitlines()]
        if done.returncode:
            raise Failed("\n".join([f"train_qlora.py ended with exit code {done.returncode}", *log[-LISTED:]]))
        *updates, whole = json.loads((self.output_dir / STATE).read_text(encoding="utf-8"))["log_history"]
        first, last = updates[0]["loss"], updates[-1]["loss"]
        tokens, seconds = updates[-1]["num_tokens"], whole["train_runtime"]
        figures = f"loss {first:.3f} to {last:.3f}, {tokens:,} tokens in {seconds:.0f} s, {self.settings_file.name}"
        kinds = ("an update is", "activation_checkpointing", " tokens/s ", " WARNING ", "done: ")
        shown = "\n".join([figures, *(line for line in log if any(kind in line for kind in kinds))])
        if not first < facts.LARGEST_LOSS:
            raise Failed(f"the first loss must be below {facts.LARGEST_LOSS}\n{shown}")
        return shown

    def check_lessons(self) -> str:
        """Ask what the sample data teaches, without and with the adapter, which must have made the answers likelier."""
        if not (self.output_dir / FINAL).is_dir():
            raise Skipped("training left no adapter")
        model = load_adapter(self.model, self.output_dir / FINAL).eval()
        shown, falls = [], True
        for lesson in find_lessons(self.data):
            with model.disable_adapter():
                before, untuned = self.try_lesson(model, lesson)
            after, tuned = self.try_lesson(model, lesson)
            falls = falls and after < before
            shown += [f"user    {lesson.turns[0].content}", f"taught  {shorten(taught_answer(lesson))}"]
            shown += [f"before  {untuned}", f"after   {tuned}", f"loss of the taught: {before:.3f} to {after:.3f}"]
        if not falls:
            raise Failed("\n".join(["each loss of the taught must fall", *shown]))
        return "\n".join(shown)

    def try_lesson(self, model, lesson: Conversation) -> tuple[float, str]:
        """(loss of all answers that the lesson teaches, the model's own answer to its question)."""
        sample = DATA_FORMATS[self.speaks].render(lesson, self.tokenizer)
        loss = self.mean_loss(model, sample.input_ids, sample.target_mask)
        return loss, shorten(ask(model, self.tokenizer, lesson))
