"""Start the real command, or the plain Trainer, with faults at exact points of it. benchmark/lab.py starts it so.

FAULTS='[{"at": "component.run.folder.seal", "do": "kill"}]' RECORD=FILE python benchmark/faults.py train_qlora ...

A fault happens at the `nth` call [1] of the function `at`: before the call, or after it where `after` is true. With
`match`, only those calls count that have this text in an argument that is text or a path. With `rank`, it happens on
this rank alone. With `once`, it happens where this file is not there, and makes it.

FILE.RANK gets a line of JSON for each fault that happened, and one for each update that begins, with digests of its
samples.
"""

import functools
import hashlib
import importlib
import itertools
import json
import os
import pkgutil
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RANK = int(os.environ.get("RANK", 0))


def main(module: str = "", *arguments: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as under a shell, whatever started this
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    if module not in RECORDERS:
        sys.exit(__doc__)
    for fault in json.loads(os.environ.get("FAULTS", "[]")):
        if fault.get("rank", RANK) == RANK:
            install(fault)
    RECORDERS[module]()
    sys.argv = [f"{module}.py", *arguments]
    importlib.import_module(module).main()


def install(fault: dict) -> None:
    """Replace the function that a fault names by one in which it happens."""
    owner_name, _, name = fault["at"].rpartition(".")
    owner, calls = pkgutil.resolve_name(owner_name), itertools.count(1)
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        texts = [str(value) for value in (*args, *kwargs.values()) if isinstance(value, (str, Path))]
        strikes = fault.get("match", "") in " ".join(texts) and next(calls) == fault.get("nth", 1)
        if strikes and not fault.get("after"):
            strike(fault, args)
        result = original(*args, **kwargs)
        if strikes and fault.get("after"):
            strike(fault, args)
        return result

    setattr(owner, name, wrapper)


def strike(fault: dict, args: tuple) -> None:
    if marker := fault.get("once"):
        if Path(marker).exists():
            return
        Path(marker).touch()
    record({"fault": fault["at"], "time": time.time()})
    ACTIONS[fault["do"]](fault, args)


def record(entry: dict) -> None:
    with open(f"{os.environ['RECORD']}.{RANK}", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def record_update(trainer, samples: list[list[int]]) -> None:
    digests = [hashlib.blake2b(str(ids).encode(), digest_size=8).hexdigest() for ids in samples]
    record({"update": trainer.state.global_step + 1, "samples": digests})


def record_updates() -> None:
    """Have every update of the real command recorded, by this rank's samples."""
    from component.train.trainer import LoRATrainer

    original = LoRATrainer.forward_and_backward

    def forward_and_backward(self, update):
        record_update(self, [sample["input_ids"].tolist() for sample in update.samples])
        return original(self, update)

    LoRATrainer.forward_and_backward = forward_and_backward


def record_plain_updates() -> None:
    """Have every update of the plain Trainer recorded, by the samples of its padded batches."""
    from transformers import Trainer

    original = Trainer.get_batch_samples

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = list(itertools.islice(epoch_iterator, num_batches))
        rows = [row for batch in batches for row in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        if rows:
            record_update(self, [ids[: mask.sum()].tolist() for ids, mask in rows])
        return original(self, iter(batches), len(batches), device)

    Trainer.get_batch_samples = get_batch_samples


RECORDERS = {"train_qlora": record_updates, "benchmark.stock": record_plain_updates}


def send(fault: dict, args: tuple) -> None:
    os.kill(os.getpid(), getattr(signal, fault["signal"]))
    time.sleep(fault.get("seconds", 0))


def limit_files(fault: dict, args: tuple) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], fault["bytes"]))


def spoil_weight(fault: dict, args: tuple) -> None:
    trained(args[0]).data.view(-1)[0] = float("nan")


def spoil_gradient(fault: dict, args: tuple) -> None:
    trained(args[0]).grad.view(-1)[0] = float("inf")


def trained(trainer):
    """One of the weights that the trainer trains."""
    return next(weight for weight in trainer.model.parameters() if weight.requires_grad)


ACTIONS = {  # what is done, given the fault and the arguments of the function that it happens in
    "kill": lambda fault, args: os.kill(os.getpid(), signal.SIGKILL),
    "signal": send,
    "sleep": lambda fault, args: time.sleep(fault["seconds"]),
    "limit files": limit_files,
    "spoil weight": spoil_weight,
    "spoil gradient": spoil_gradient,
}


if __name__ == "__main__":
    main(*sys.argv[1:])
