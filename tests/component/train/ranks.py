"""Training by several processes, for test_ranks.py: they are forks of this program, which has the libraries loaded.

python -m tests.component.train.ranks FOLDER

trains every configuration of FOLDER/configurations.json. The processes of one number form a group, which trains one
configuration after another; each process leaves in FOLDER what it saw of each.

python -m tests.component.train.ranks FOLDER SETTINGS[:STEP] ...

runs the command on two processes, once for each file of settings; the second is sent SIGTERM after update STEP.

Printed is the exit code of each group. A process that takes longer than DEADLINE for a configuration, or for the
command, ends with the place where it hung in FOLDER/PROCESSES-RANK.log.
"""

import faulthandler
import gc
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments

import train_qlora
from component.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from component.kernel.memory import PADDED, choose_plan
from component.kernel.model import PackedForward
from component.model import attach_lora
from component.run.process import die_with_parent
from component.settings.fields import FIXED
from component.settings.schema import QLoRAArguments
from component.train.batch import PackingCollator, SFTDataCollator
from component.train.loss import TargetLMLoss
from component.train.progress import ProgressReport
from component.train.trainer import LoRATrainer

DEADLINE = 60  # seconds for one configuration
LONGEST, ROW = 16, 40  # tokens of a sample and of a packed row
VOCABULARY = 64
EVAL_ROWS = 7
LOGGED = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "eval_loss")
TOKENIZER = SimpleNamespace(pad_token_id=0)  # all that padding asks for


@dataclass(frozen=True)
class Configuration:
    """One run, in the ways in which different numbers of processes make it.

    Args:
        rows: to train on.
        splits: (processes, per_device_train_batch_size, gradient_accumulation_steps).
        layout: padded or packed.
        dropout: of the adapter.
        alike: all rows are one and the same.
        settings: further TrainingArguments.
    """

    rows: int
    splits: tuple[tuple[int, int, int], ...]
    layout: str
    epochs: float = 1
    dropout: float = 0.0
    alike: bool = False
    settings: dict | None = None


class Samples(torch.utils.data.Dataset):
    """Random samples of 3 to LONGEST tokens, of which some are learned; sample i is the same in all of them."""

    def __init__(self, rows: int, alike: bool = False):
        self.samples = [make_sample(0 if alike else i) for i in range(rows)]
        self.lengths = [len(sample["input_ids"]) for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return self.samples[i]


def make_sample(number: int) -> dict[str, list[int]]:
    draw = random.Random(number)
    length = draw.randint(3, LONGEST)
    mask = [0, *(draw.randint(0, 1) for _ in range(length - 2)), 1]
    ids = [draw.randrange(1, VOCABULARY) for _ in range(length)]
    return {"input_ids": ids, "attention_mask": [1] * length, "target_mask": mask}


def make_model(dropout: float):
    torch.manual_seed(0)
    config = ChatGLMConfig(
        padded_vocab_size=VOCABULARY,
        hidden_size=16,
        ffn_hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        kv_channels=8,
        initializer_range=0.3,
    )
    args = QLoRAArguments("model", "rows", lora_rank=2, lora_alpha=2, lora_dropout=dropout)
    model = attach_lora(ChatGLMForConditionalGeneration(config), args)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zeros, which would leave lora_A without a gradient at first
            torch.nn.init.normal_(weight, std=0.3)
    return model


def make_trainer(run: Configuration, batch: int, accumulation: int, folder: Path, callback: TrainerCallback):
    """The trainer as train_qlora.train() makes it: its model with the layout set, and its arguments."""
    model = make_model(run.dropout)
    packed = run.layout == "packed"
    plan = choose_plan(
        PackedForward(model, LONGEST, fuses=packed),
        tokens=ROW if packed else PADDED,
        checkpointing="auto",
        longest=LONGEST,
        optimizer_bytes=8,
        packing=packed,
    )
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "ddp_backend": "gloo" if "RANK" in os.environ else None,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": DEADLINE,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": 2,
        "num_train_epochs": run.epochs,
        "learning_rate": 0.1,
        "optim": "sgd",  # in whose steps a difference of rounding stays one
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return LoRATrainer(
        model=model,
        args=TrainingArguments(**FIXED | settings | (run.settings or {})),
        train_dataset=Samples(run.rows, run.alike),
        eval_dataset=Samples(EVAL_ROWS),
        data_collator=PackingCollator(plan.tokens) if packed else SFTDataCollator(TOKENIZER, LONGEST),
        loss=TargetLMLoss(),
        callbacks=[callback],
    )


class Recorder(TrainerCallback):
    """What is logged, the adapter after each update, and what each forward pass of training gave."""

    def __init__(self):
        self.logged: list[dict] = []
        self.adapters: list[torch.Tensor] = []
        self.outputs: list[float] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.register_forward_hook(self.on_forward)

    def on_forward(self, model, inputs, output) -> None:
        if model.training:
            self.outputs.append((output.logits.double().sum() if hasattr(output, "logits") else output).item())

    def on_step_end(self, args, state, control, model, **kwargs):
        weights = [weight.detach().flatten() for weight in model.parameters() if weight.requires_grad]
        self.adapters.append(torch.cat(weights))

    def on_log(self, args, state, control, logs, **kwargs):
        known = {"step": state.global_step} | logs
        self.logged.append({key: known[key] for key in LOGGED if key in known})


def train_all(runs: list[Configuration], processes: int, rank: int, folder: Path) -> None:
    """Train every configuration that so many processes can make, and leave what this one saw of each."""
    for number, run in enumerate(runs):
        for count, batch, accumulation in run.splits:
            if count == processes:
                print(f"configuration {number}: {batch} x {accumulation} of {run}", flush=True)
                faulthandler.dump_traceback_later(DEADLINE, exit=True)
                recorder = Recorder()
                make_trainer(run, batch, accumulation, folder / "output", recorder).train()
                torch.save(vars(recorder), folder / f"{number}-{processes}-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def run_command(settings: str, stop: str, processes: int, rank: int, folder: Path) -> None:
    """Be train_qlora.py; after the update `stop`, if there is one, rank 1 is asked to leave."""
    on_step_end = ProgressReport.on_step_end

    def on_step_end_then_stop(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if (rank, str(state.global_step)) == (1, stop):
            os.kill(os.getpid(), signal.SIGTERM)

    ProgressReport.on_step_end = on_step_end_then_stop
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    sys.argv = ["train_qlora.py", "--train_args_file", str(folder / settings)]
    train_qlora.main()


class Group:
    """So many forks that each do `work(processes, rank, folder)`, in an environment as torchrun sets it."""

    def __init__(self, work: Callable, processes: int, folder: Path):
        self.server = socket.create_server(("127.0.0.1", 0))
        port = self.server.getsockname()[1]
        fork = multiprocessing.get_context("fork").Process
        self.members = [fork(target=live, args=(work, processes, rank, port, folder)) for rank in range(processes)]
        for member in self.members:
            member.start()

    def host_store(self) -> dist.TCPStore:
        """Where members meet. As torchrun's, it outlives each of them; its thread is one that forks would lack."""
        host, port = self.server.getsockname()
        listening = self.server.detach()
        return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening)

    def wait(self) -> int:
        """The exit code of the first member that ended with one, or 0."""
        for member in self.members:
            member.join()
        return next((member.exitcode for member in self.members if member.exitcode), 0)


def live(work: Callable, processes: int, rank: int, port: int, folder: Path) -> None:
    die_with_parent()
    log = os.open(folder / f"{processes}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ |= {key: str(value) for key, value in (names | address).items()}
    work(processes, rank, folder)


def main(folder: Path, commands: list[str]) -> None:
    torch.set_num_threads(1)  # no threads that a fork would lack
    gc.freeze()  # a trainer collects garbage, which takes a quarter of a second among the libraries' objects
    exit_codes = []
    for command in commands:
        settings, _, stop = command.partition(":")
        exit_codes += wait_for([Group(partial(run_command, settings, stop), 2, folder)])
    if not commands:
        runs = [Configuration(**fields) for fields in json.loads((folder / "configurations.json").read_text())]
        sizes = {processes for run in runs for processes, _, _ in run.splits}
        exit_codes += wait_for([Group(partial(train_all, runs), processes, folder) for processes in sizes])
    print(json.dumps(exit_codes))


def wait_for(groups: list[Group]) -> list[int]:
    """Their exit codes."""
    stores = [group.host_store() for group in groups]
    exit_codes = [group.wait() for group in groups]
    del stores
    return exit_codes


def write_configurations(runs: list[Configuration], folder: Path) -> None:
    (folder / "configurations.json").write_text(json.dumps([asdict(run) for run in runs]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
