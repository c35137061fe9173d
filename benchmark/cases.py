"""The cases of the reliability scorecard: what is injected, what is expected, and how it is seen."""

import contextlib
import hashlib
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmark.faults import PRODUCT, STOCK, Lab, Run, kill, make_model, make_rows, write_rows

TRAINER = {PRODUCT: "component.train.trainer.LoRATrainer", STOCK: "transformers.Trainer"}
FORWARD = {PRODUCT: "component.train.trainer.LoRATrainer.summed_loss", STOCK: "transformers.Trainer.compute_loss"}
UPDATE = "transformers.Trainer.training_step"  # once an update here, since four samples are one row
TWO_RANKS = {"ranks": 2, "per_device_train_batch_size": 2}


@dataclass
class Check:
    """One try of a case.

    Args:
        failed: what was expected of it and did not happen.
        facts: figures, and words, that the table sums up.
        log: of the last start.
    """

    name: str
    failed: list[str]
    facts: dict[str, float | str] = field(default_factory=dict)
    log: str = ""


@dataclass
class Case:
    """A row of the scorecard.

    Args:
        stock: whether the plain Trainer is tried too.
        earlier: what it did when the scorecard was drawn up.
        tests: of the suite, that are this case.
    """

    number: int
    fault: str
    expected: str
    tries: Callable[[Lab], Iterator[Check]] | None = None
    stock: bool = False
    earlier: str = ""
    tests: tuple[str, ...] = ()

    @property
    def seeded(self) -> bool:
        """Whether it is tried with every seed, or with the first alone."""
        return self.number <= 18


def check(name: str, run: Run, expected: dict[str, bool], **facts: float | str) -> Check:
    facts = {key.replace("_", " "): value for key, value in facts.items()}
    return Check(name, [what for what, holds in expected.items() if not holds], facts, run.log)


def exactly(lab: Lab, name: str, run: Run, reference: Path, expected: dict[str, bool] | None = None, **facts) -> Check:
    """A check that a run ended, and ended with the numbers of the uninterrupted `reference`."""
    result = check(name, run, (expected or {}) | {"exit code 0": run.code == 0}, **facts)
    try:
        differences = lab.compare(run.folder, reference)
    except (OSError, ValueError) as error:
        differences = {}
        result.failed.append(f"results that can be compared ({error})")
    result.failed += [f"the same {key}" for key, value in differences.items() if value != 0]
    result.facts |= {f"{key} diff": value for key, value in differences.items()}
    return result


def killed(at: str, **rest) -> list[dict]:
    return [{"at": at, "do": "kill"} | rest]


def stopped(lab: Lab, name: str, update: int, **changes) -> Run:
    """A run killed as `update` begins, which leaves the checkpoints before it."""
    run = lab.run(name, killed(UPDATE, nth=update), **changes)
    if run.code != -signal.SIGKILL:
        raise RuntimeError(f"the run to be killed ended with {run.code}\n{run.log[-3000:]}")
    return run


def copy(lab: Lab, run: Run, name: str) -> Path:
    folder = lab.folder / name
    shutil.copytree(run.folder, folder)
    lab.lineage[folder] = list(lab.lineage[run.folder])
    return folder


def kept(folder: Path) -> str:
    return ", ".join(sorted((path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")), key=int))


def was_set_aside(folder: Path, name: str) -> bool:
    return any((folder / "aside").glob(f"{name}.*"))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


# A: checkpoint safety

SAVE_CALLS = {
    PRODUCT: [
        *(
            (f"{when} {name}", {"at": at, "after": when == "after", "match": "checkpoint-6"})
            for name, at in {
                "the folder": "component.run.folder.RunFolder.begin",
                "the adapter": "peft.PeftModel.save_pretrained",
                "the tokenizer": "transformers.PreTrainedTokenizerBase.save_pretrained",
                "optimizer.pt": "component.train.trainer.LoRATrainer._save_optimizer_and_scheduler",
                "the random states": "component.train.trainer.LoRATrainer._save_rng_state",
                "trainer_state.json": "transformers.TrainerState.save_to_json",
                "the manifest": "component.run.folder.seal",
                "the rename": "os.rename",
            }.items()
            for when in ("before", "after")
        ),
        ("between two fsyncs", {"at": "component.run.files.sync", "match": "checkpoint-6", "nth": 4}),
        ("before rotation", {"at": "component.run.folder.RunFolder.rotate", "nth": 3}),
        ("rotation, renamed", {"at": "os.rename", "match": ".tmp-checkpoint-3", "nth": 2, "after": True}),
        ("rotation, half deleted", {"at": "os.unlink", "match": "optimizer.pt"}),
        ("after rotation", {"at": "component.run.folder.RunFolder.rotate", "nth": 3, "after": True}),
    ],
    STOCK: [
        (f"after {name}", {"at": f"transformers.Trainer.{call}", "match": "checkpoint-6", "after": True})
        for name, call in {
            "the adapter": "save_model",
            "optimizer.pt": "_save_optimizer_and_scheduler",
            "the random states": "_save_rng_state",
        }.items()
    ]
    + [("before trainer_state.json", {"at": "transformers.TrainerState.save_to_json", "match": "checkpoint-6"})],
}


def kills_in_saves(lab: Lab) -> Iterator[Check]:
    reference = lab.reference(save_total_limit=2)
    for number, (name, fault) in enumerate(lab.some(SAVE_CALLS[lab.program])):
        run = lab.run(f"save-{number}", [fault | {"do": "kill"}], save_total_limit=2)
        again = lab.run(f"save-{number}", save_total_limit=2)
        lost = run.begun() - again.begins_at()
        expected = {"a kill": run.code == -signal.SIGKILL, "at most save_steps lost": lost <= 3}
        yield exactly(lab, name, again, reference, expected, lost_steps=lost)
    if lab.program == PRODUCT:
        yield from kills_at_random(lab)


def kills_at_random(lab: Lab) -> Iterator[Check]:
    """One long run, killed and started again until it is done."""
    kills = math.ceil(100 / lab.seeds * lab.share)
    settings = {"max_steps": 12 + 6 * kills, "save_steps": 2, "save_total_limit": 2, "logging_steps": 10}
    reference = lab.reference(**settings)
    draw = random.Random(lab.seed)
    begun, startup, trained = 0, 0.5, 0
    for number in range(kills):
        run = lab.start("random", **settings)
        if number == 0:
            run.wait_for(run.begun)
            startup = time.time() - run.started
        time.sleep(draw.uniform(0.3, 1.5) * startup)
        kill(run.process.pid)
        run.wait()
        lost = begun - run.begins_at() if run.begun() else 0
        begun, trained = max(run.begun(), begun - lost), trained + bool(run.begun())
        expected = {"a kill": run.code == -signal.SIGKILL, "at most save_steps lost": lost <= 2}
        yield check(f"random kill {number + 1}", run, expected, lost_steps=lost)
    last = lab.run("random", **settings)
    lost = begun - last.begins_at()
    facts = {"lost_steps": lost, "random kills in training": trained}
    yield exactly(lab, "after all random kills", last, reference, {"at most save_steps lost": lost <= 2}, **facts)


FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def damaged_files(lab: Lab) -> Iterator[Check]:
    reference, base = lab.reference(), stopped(lab, "base", 8)
    for name in lab.some(FILES):
        for damage in ("halved", "one byte flipped"):
            folder = copy(lab, base, f"{name}-{damage[:3]}")
            path = folder / "checkpoint-6" / name
            content = bytearray(path.read_bytes())
            middle = len(content) // 2
            content[middle] ^= 1
            path.write_bytes(content[:middle] if damage == "halved" else content)
            run = lab.run(folder.name)
            expected = {
                "back to checkpoint-3": run.begins_at() == 3,
                "checkpoint-6 moved aside": was_set_aside(folder, "checkpoint-6"),
            }
            yield exactly(lab, f"{name} {damage}", run, reference, expected)


def missing_optimizer(lab: Lab) -> Iterator[Check]:
    yield from missing_file(lab, "optimizer.pt")


def missing_file(lab: Lab, pattern: str) -> Iterator[Check]:
    """A checkpoint without a file is refused, and used on an explicit flag, with a warning."""
    folder = stopped(lab, f"without-{pattern[:3]}", 5).folder
    for path in (folder / "checkpoint-3").glob(pattern):
        path.unlink()
    run = lab.run(folder.name)
    facts = {}
    if run.code == 0:
        facts["adapter diff"] = lab.compare(folder, lab.reference())["adapter"]
    yield check("refused", run, {"exit code 4": run.code == 4}, exit_code=run.code, **facts)
    if lab.program == PRODUCT:
        given = {"resume_from_checkpoint": str(folder / "checkpoint-3"), "resume_despite_changes": True}
        yield warned("used on request", lab.run(folder.name, **given))


def warned(name: str, run: Run) -> Check:
    return check(name, run, {"exit code 0": run.code == 0, "a warning": "not exact" in run.log})


def missing_random_state(lab: Lab) -> Iterator[Check]:
    yield from missing_file(lab, "rng_state*")
    if lab.seed or lab.program == STOCK:
        return
    settings = {"per_device_train_batch_size": 2}
    folder = lab.folder / "two-ranks"
    shutil.copytree(lab.reference(**TWO_RANKS), folder)
    for name in ("final", "checkpoint-12"):
        shutil.rmtree(folder / name)
    run = lab.run("two-ranks", **settings)
    told = "number of processes: 2 then, 1 now"
    expected = {"exit code 2": run.code == 2, "number of processes named": told in run.log}
    yield check("2 ranks on 1", run, expected, exit_code=run.code)
    yield warned("2 ranks on 1, on request", lab.run("two-ranks", resume_despite_changes=True, **settings))


@contextlib.contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[bool]:
    """A small file system of memory at `folder`; False where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(lab: Lab) -> Iterator[Check]:
    reference = lab.reference()
    folder = stopped(lab, "limit", 8).folder
    before = digests(folder / "checkpoint-6")
    run = lab.run("limit", [{"at": UPDATE, "do": "limit files", "bytes": 12_000}])
    yield storage_error("files of at most 12 kB", run, folder / "checkpoint-6", before)
    yield exactly(lab, "with room again", lab.run("limit"), reference)

    with tmpfs(lab.folder / "small", "size=1m") as mounted:
        if mounted:
            settings = {"save_steps": 1}
            run = lab.run("small", **settings)
            newest = max((lab.folder / "small").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
            yield storage_error("1 MiB tmpfs", run, newest, digests(newest))
            subprocess.run(["mount", "-o", "remount,size=32m", str(lab.folder / "small")], check=True)
            yield exactly(lab, "1 MiB made 32", lab.run("small", **settings), reference)
    if lab.program == PRODUCT:
        with tmpfs(lab.folder / "tiny", "size=64k") as mounted:
            if mounted:
                run = lab.run("tiny")
                expected = {"exit code 4": run.code == 4, "no update": run.begun() == 0, "need": "need" in run.log}
                yield check("preflight on 64 KiB", run, expected, exit_code=run.code)


def storage_error(name: str, run: Run, checkpoint: Path, before: dict[str, str]) -> Check:
    expected = {
        "exit code 4": run.code == 4,
        "a path": f"{run.folder}/checkpoint-" in run.log,
        "what was written": "could not be written" in run.log,
        "what is free": " free" in run.log,
        "the old checkpoint as it was": bool(before) and digests(checkpoint) == before,
    }
    return check(name, run, expected, exit_code=run.code)


def partial_checkpoint(lab: Lab) -> Iterator[Check]:
    """Good 3 and partial 9; the run goes on from 3, saves 6 with a limit of 2, and is killed."""
    folder = stopped(lab, "run", 5).folder
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-9")
    (folder / "checkpoint-9/optimizer.pt").unlink()
    settings = {"save_total_limit": 2}
    run = lab.run("run", killed(UPDATE, nth=5), resume_from_checkpoint=str(folder / "checkpoint-3"), **settings)
    expected = {"3 and 6 kept": kept(folder) == "3, 6"}
    yield check("rotation beside a partial checkpoint", run, expected, kept=kept(folder))
    yield exactly(lab, "to the end", lab.run("run", **settings), lab.reference())


def stale_checkpoint(lab: Lab) -> Iterator[Check]:
    """Good 3 and an empty 999 with the same times; the run goes on from 3 and saves 6 with a limit of 1."""
    folder = stopped(lab, "run", 5).folder
    (folder / "checkpoint-999").mkdir()
    settings = {"save_total_limit": 1}
    rotate = {PRODUCT: "component.run.folder.RunFolder.rotate", STOCK: "transformers.trainer.rotate_checkpoints"}
    faults = [{"at": rotate[lab.program], "do": "equal times", "folder": str(folder)}, *killed(UPDATE, nth=5)]
    run = lab.run("run", faults, resume_from_checkpoint=str(folder / "checkpoint-3"), **settings)
    expected = {"6 kept": "6" in kept(folder).split(", "), "999 not kept": "999" not in kept(folder)}
    yield check("rotation beside a stale folder", run, expected, kept=kept(folder))
    yield exactly(lab, "to the end", lab.run("run", **settings), lab.reference())


FINAL_CALLS = [
    (f"{when} {name}", {"at": at, "after": when == "after", "match": "final"})
    for name, at in {
        "the folder": "component.run.folder.RunFolder.begin",
        "the adapter": "peft.PeftModel.save_pretrained",
        "the tokenizer": "transformers.PreTrainedTokenizerBase.save_pretrained",
        "the manifest": "component.run.folder.seal",
        "the rename": "os.rename",
    }.items()
    for when in ("before", "after")
]
WRITTEN = re.compile(
    r'openat\(.*?"([^"]+)", [A-Z_|]*O_CREAT|fsync\(\d+<([^>]+)>|rename(?:at2?)?\([^"]*"([^"]+)",[^"]*"([^"]+)"'
)
DELETED = re.compile(r'(?:unlinkat|rmdir|unlink)\((?:\d+<([^>]+)>|AT_FDCWD\S*)?,? ?"([^"]+)"')


def export_and_order(lab: Lab) -> Iterator[Check]:
    from safetensors.torch import load_file

    reference = lab.reference()
    for number, (name, fault) in enumerate(lab.some(FINAL_CALLS)):
        run = lab.run(f"final-{number}", [fault | {"do": "kill"}])
        final = run.folder / "final"
        loads = not final.exists() or bool(load_file(final / "adapter_model.safetensors"))
        again = lab.run(f"final-{number}")
        expected = {"a kill": run.code == -signal.SIGKILL, "old or new": loads}
        yield exactly(lab, f"final, {name}", again, reference, expected)
    if lab.seed == 0 and shutil.which("strace"):
        trace = lab.folder / "trace"
        calls = "trace=openat,fsync,rename,renameat,renameat2,unlink,unlinkat,rmdir"
        prefix = ["strace", "-f", "-y", "--seccomp-bpf", "-s", "4096", "-e", calls, "-o", str(trace)]
        run = lab.start("traced", forks=False, prefix=prefix, save_total_limit=2).wait(240)
        renamed, violations = violations_of_order(trace, run.folder)
        expected = {"exit code 0": run.code == 0, "4 checkpoints and a final": renamed == 5, "order": not violations}
        result = check("strace", run, expected, violations=len(violations))
        result.log += "\n".join(violations)
        yield result


def violations_of_order(trace: Path, folder: Path) -> tuple[int, list[str]]:
    """How many folders a traced run published, and what was not fsync, rename, fsync of the parent, delete."""
    violations, unsynced, published = [], set(), 0
    for line in trace.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := WRITTEN.search(line):
            created, synced, old, new = match.groups()
            if created and f"{folder}/.tmp-" in created:
                unsynced |= {created, str(Path(created).parent)}
            elif synced:
                unsynced.discard(synced)
            elif old and Path(old).parent == folder and Path(old).name.startswith(".tmp-"):
                violations += [f"{new}: {path} is not synced" for path in unsynced if path.startswith(old)]
                published += 1
                unsynced.add(str(folder))
            elif old and Path(old).parent == folder and str(folder) in unsynced:
                violations.append(f"{old} is to be deleted before {folder} is synced")
            elif old in unsynced:  # a library's own temporary file, renamed in the folder
                unsynced = unsynced - {old} | {new}
        elif (match := DELETED.search(line)) and str(folder) in unsynced:
            path = Path(match[1] or "", match[2])
            if folder in path.parents and published:
                violations.append(f"{path} is deleted before {folder} is synced")
    return published, violations


def refused_folders(lab: Lab) -> Iterator[Check]:
    def refused(name: str, run: Run, code: int) -> Check:
        seconds = run.ended - run.started
        expected = {f"exit code {code}": run.code == code, "no model loaded": "loading " not in run.log}
        return check(name, run, expected | {"less than 5 s": seconds < 5}, seconds=seconds)

    with tmpfs(lab.folder / "readonly", "ro") as mounted:
        if mounted:
            yield refused("read-only folder", lab.run("readonly"), 4)
    stopped(lab, "other", 5, learning_rate=1e-3)
    yield refused("another run's folder", lab.run("other"), 2)

    first = lab.start("shared", [{"at": UPDATE, "nth": 2, "do": "sleep", "seconds": 4}])
    first.wait_for(lambda: first.begun() == 2)
    yield refused("a folder in use", lab.run("shared"), 2)
    lab.lineage[first.folder].pop()
    yield exactly(lab, "the run that has it", first.wait(), lab.reference())


# B: exact resume

PLACES = {"step 1": 2, "mid-epoch 1": 5, "boundary": 7, "mid-epoch 2": 10, "last": 12}  # the update that dies


def kills_everywhere(lab: Lab) -> Iterator[Check]:
    """On a CPU one setting after the other; on a GPU, where a run takes long to start, side by side."""
    optimizers = ["adamw_torch"] if lab.device == "cpu" else ["adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit"]
    settings = [(optim, workers) for optim in optimizers for workers in (0, 2)]
    with ThreadPoolExecutor(len(settings)) as pool:
        for checks in (map if lab.device == "cpu" else pool.map)(lambda each: list(kills_with(lab, *each)), settings):
            yield from checks


def kills_with(lab: Lab, optim: str, workers: int) -> Iterator[Check]:
    settings = {"optim": optim, "dataloader_num_workers": workers}
    reference = lab.reference(**settings)
    for place, update in zip(lab.some(list(PLACES)), lab.some(list(PLACES.values())), strict=True):
        name = f"{optim}-{workers}-{update}"
        stopped(lab, name, update, save_steps=1, **settings)
        run = lab.run(name, save_steps=1, **settings)
        expected = {"from where it was": run.begins_at() == update - 1}
        yield exactly(lab, f"{place}, {optim}, {workers} workers", run, reference, expected)


def length_grouping(lab: Lab) -> Iterator[Check]:
    settings = {"train_sampling_strategy": "group_by_length", "packing": False, "per_device_train_batch_size": 3}
    reference = lab.reference(**settings)
    for update in (5, 11):
        stopped(lab, f"run-{update}", update, **settings)
        yield exactly(lab, f"killed at {update}", lab.run(f"run-{update}", **settings), reference)


def twenty_cycles(lab: Lab) -> Iterator[Check]:
    cycles = round(20 * lab.share)
    settings = {"max_steps": 2 * cycles + 2, "save_steps": 1, "save_total_limit": 2}
    reference = lab.reference(**settings)
    for _ in range(cycles):
        stopped(lab, "run", 3, **settings)
    run = lab.run("run", **settings)
    wrong = lab.repeated_and_skipped(run.folder)
    expected = {"every sample once an epoch": wrong == 0, "from the last kill": run.begins_at() == 2 * cycles}
    yield exactly(lab, f"{cycles} cycles", run, reference, expected, repeated_and_skipped=wrong)


def without_skipping(lab: Lab) -> Iterator[Check]:
    stopped(lab, "run", 5)
    run = lab.run("run", ignore_data_skip=True, resume_despite_changes=True)
    differences = lab.compare(run.folder, lab.reference())
    expected = {key: differences[key] > 0 for key in ("adapter", "batches")}
    facts = {f"{key} diff": differences[key] for key in ("adapter", "batches")}
    yield check("data not skipped", run, {"exit code 0": run.code == 0} | expected, **facts)


def changed_runs(lab: Lab) -> Iterator[Check]:
    base = stopped(lab, "run", 5)
    other_base = lab.folder / "chatglm3-other"
    make_model(other_base, make_rows(24), seed=1)
    other_data = write_rows(lab.folder / "other.jsonl", make_rows(25)[1:])
    changes = {
        "seed": {"seed": lab.seed + 100},
        "learning_rate": {"learning_rate": 5e-3},
        "data": {"train_file": str(other_data)},
        "format": {"data_format": "chatglm2"},
        "base_model": {"model_name_or_path": str(other_base)},
    }
    if lab.program == STOCK:
        del changes["format"]  # it has none
    for name, change in changes.items():
        run = lab.run(copy(lab, base, f"changed-{name}").name, **change)
        expected = {"exit code 2": run.code == 2, "the change named": name in run.log}
        yield check(f"another {name}", run, expected, exit_code=run.code)
    if lab.program == PRODUCT:
        yield warned(
            "another seed, on request", lab.run("changed-seed", resume_despite_changes=True, **changes["seed"])
        )


def two_fresh_runs(lab: Lab) -> Iterator[Check]:
    yield exactly(lab, "a second run", lab.run("again"), lab.reference())


# C: signals


SLOW = {PRODUCT: 0.5, STOCK: 4}  # seconds of a forward in which a signal comes; the plain Trainer heeds it after 3


def just_in_time(lab: Lab) -> dict:
    """The setting by which the plain Trainer answers signals."""
    return {"enable_jit_checkpoint": True} if lab.program == STOCK else {}


def term_in_forward(lab: Lab) -> Iterator[Check]:
    fault = {"at": FORWARD[lab.program], "nth": 5, "do": "signal", "signal": "SIGTERM", "seconds": SLOW[lab.program]}
    run = lab.run("run", [fault], save_steps=100, **just_in_time(lab))
    expected = {"exit code 143": run.code == 143, "checkpoint-5": kept(run.folder) == "5"}
    seconds = run.since_fault()
    again = lab.run("run", save_steps=100, **just_in_time(lab))
    expected["from checkpoint-5"] = again.begins_at() == 5
    yield exactly(lab, "resumed", again, lab.reference(), expected, seconds=seconds)


STAGES = {
    "load": {"at": "component.model.load_model"},
    "tokenise": {"at": "component.data.dataset.fill_store", "after": True},
    "step": {"at": FORWARD[PRODUCT], "nth": 5},
    "eval": {"at": "component.train.trainer.LoRATrainer.evaluate"},
    "save": {"at": "component.train.trainer.LoRATrainer._save_rng_state", "match": "checkpoint-6"},
    "export": {"at": "peft.PeftModel.save_pretrained", "match": ".tmp-final"},
}


def signals_in_stages(lab: Lab) -> Iterator[Check]:
    stages = STAGES if lab.program == PRODUCT else {"step": {"at": FORWARD[STOCK], "nth": 5, "seconds": SLOW[STOCK]}}
    settings = just_in_time(lab)
    if lab.program == PRODUCT:
        settings |= {"eval_file": str(lab.root / "eval.jsonl"), "eval_strategy": "steps", "eval_steps": 4}
    reference = lab.reference(**settings)
    for stage in lab.some(list(stages)):
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            name = f"{stage}-{signum.name}"
            own = settings | ({"cache_dir": str(lab.folder / f"cache-{name}")} if stage == "tokenise" else {})
            run = lab.run(name, [stages[stage] | {"do": "signal", "signal": signum.name}], **own)
            expected = {
                f"exit code {128 + signum}": run.code == 128 + signum,
                "no mark of a run that is done": not (run.folder / "final").exists(),
            }
            seconds = run.since_fault()
            result = exactly(
                lab, f"{signum.name} in {stage}", lab.run(name, **own), reference, expected, seconds=seconds
            )
            result.facts |= {"exit code": run.code} if lab.program == STOCK else {}
            yield result


def second_interrupt(lab: Lab) -> Iterator[Check]:
    run = lab.start("run", [{"at": FORWARD[lab.program], "nth": 5, "do": "sleep", "seconds": 20}])
    run.wait_for(run.fault)
    for pause in (0.3, 0):
        kill(run.process.pid, signal.SIGINT)
        time.sleep(pause)
    second = time.time()
    run.wait()
    seconds = run.ended - second
    expected = {"exit code 130": run.code == 130, "less than 1 s": seconds < 1, "checkpoint-3": kept(run.folder) == "3"}
    yield exactly(lab, "resumed", lab.run("run"), lab.reference(), expected, seconds=seconds)


# E: numerics


def bad_numbers(lab: Lab) -> Iterator[Check]:
    trainer = TRAINER[lab.program]
    faults = {
        "NaN in a weight": {"at": f"{trainer}.training_step", "nth": 5, "do": "spoil weight"},
        "Inf in a gradient": {"at": f"{trainer}.training_step", "nth": 5, "after": True, "do": "spoil gradient"},
    }
    for name, fault in faults.items():
        run = lab.run(name.replace(" ", "-"), [fault])
        expected = {"exit code 3": run.code == 3, "nothing bad saved": not bad_tensors(run.folder)}
        late = run.begun() - 5
        facts = {"steps to stop": late, "NaN tensors on disk": bad_tensors(run.folder), "exit code": run.code}
        yield check(name, run, expected | {"a stop at once": late == 0}, **facts)
    run = lab.run("lr", learning_rate=1e20)
    expected = {"exit code 3": run.code == 3, "nothing bad saved": not bad_tensors(run.folder)}
    facts = {"NaN tensors on disk": bad_tensors(run.folder), "exit code": run.code}
    yield check("learning rate 1e20", run, expected, **facts)
    if lab.program == PRODUCT:
        run = lab.run("skipped", [faults["Inf in a gradient"]], max_skipped_updates=1)
        expected = {"exit code 0": run.code == 0, "nothing bad saved": not bad_tensors(run.folder)}
        yield check("one left out on request", run, expected | {"a warning": "left out, 1 of" in run.log})
    if lab.program == PRODUCT and lab.device == "cpu":
        fault = {"at": f"{trainer}._save_checkpoint", "rank": 1, "do": "spoil weight"}
        run = lab.start("one-rank", [fault], **TWO_RANKS).wait()
        expected = {"an error": bool(run.code), "the cause told": "others are not finite" in run.log}
        facts = {"NaN tensors on disk": bad_tensors(run.folder)}
        yield check("NaN on one rank of two", run, expected | {"nothing saved": not kept(run.folder)}, **facts)


def bad_tensors(folder: Path) -> int:
    """Tensors on disk with a figure that is not finite, in adapters and optimizer states."""
    import torch
    from safetensors.torch import load_file

    tensors = [tensor for path in folder.rglob("*.safetensors") for tensor in load_file(path).values()]
    for path in folder.rglob("optimizer.pt"):
        states = torch.load(path, weights_only=True, map_location="cpu")["state"].values()
        tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(not tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point())


def accumulation_and_ranks(lab: Lab) -> Iterator[Check]:
    settings = {"optim": "sgd", "lora_dropout": 0.0, "max_steps": 6}
    reference = lab.reference(**settings)
    shapes = {
        "4 x 1": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "2 ranks of 2": TWO_RANKS,
    }
    for name, shape in shapes.items():
        run = lab.start(name.replace(" ", ""), **settings | shape).wait()
        differences = (
            lab.compare(run.folder, reference) if run.code == 0 else dict.fromkeys(("loss", "adapter"), float("inf"))
        )
        facts = {f"{key} diff": differences[key] for key in ("loss", "adapter")}
        expected = {f"{key} of at most 1e-6": value <= 1e-6 for key, value in facts.items()}
        yield check(name, run, {"exit code 0": run.code == 0} | expected, **facts)


# F: two processes under torchrun


def one_killed(lab: Lab) -> Iterator[Check]:
    run = lab.start("run", killed(FORWARD[lab.program], nth=5, rank=1), **TWO_RANKS).wait()
    seconds, orphans = run.since_fault(1), len(run.processes())
    expected = {"less than 30 s": seconds < 30, "no orphans": not orphans, "an error": run.code not in (0, None)}
    again = lab.start("run", **TWO_RANKS).wait()
    facts = {"seconds": seconds, "orphans": orphans}
    yield exactly(lab, "relaunched", again, lab.reference(**TWO_RANKS), expected, **facts)


def one_signalled(lab: Lab) -> Iterator[Check]:
    fault = {"at": FORWARD[lab.program], "nth": 5, "rank": 1, "do": "signal", "signal": "SIGTERM"}
    fault["seconds"] = SLOW[lab.program]
    run = lab.start("run", [fault], save_steps=100, **TWO_RANKS, **just_in_time(lab)).wait(45)
    seconds, orphans = run.since_fault(1), len(run.processes())
    end = "when killed" if "killed after" in run.log else "by itself"
    expected = {
        "less than 10 s": seconds < 10,
        "no orphans": not orphans,
        "143, and nobody killed": len(re.findall(r"exitcode\s*: 143", run.log)) >= 1 and end == "by itself",
        "checkpoint-5": kept(run.folder) == "5",
    }
    facts = {"ended": end, "seconds": seconds, "orphans": orphans, "kept": kept(run.folder)}
    if lab.program == STOCK:
        yield check("SIGTERM to rank 1", run, expected, **facts)
        return
    again = lab.start("run", save_steps=100, **TWO_RANKS).wait()
    yield exactly(lab, "relaunched", again, lab.reference(**TWO_RANKS), expected, **facts)


def agent_killed(lab: Lab) -> Iterator[Check]:
    run = lab.start("run", [{"at": FORWARD[lab.program], "nth": 5, "do": "sleep", "seconds": 60}], **TWO_RANKS)
    run.wait_for(run.fault)
    kill(run.process.pid)
    began = time.time()
    while (alive := len(run.processes())) and time.time() < began + 10:
        time.sleep(0.05)
    seconds = time.time() - began
    for pid in run.processes():
        kill(pid)
    again = lab.start("run", **TWO_RANKS).wait()
    facts = {"orphans": alive, "seconds": seconds}
    yield exactly(lab, "relaunched", again, lab.reference(**TWO_RANKS), {"no orphans": alive == 0}, **facts)


def bad_row_and_odd_rows(lab: Lab) -> Iterator[Check]:
    bad = {"conversations": [{"role": "usr", "content": "x"}]}
    file = write_rows(lab.folder / "bad.jsonl", [*make_rows(23), bad])
    run = lab.start("bad", train_file=str(file), **TWO_RANKS).wait()
    cause = run.log.find(f"{file}:24: conversations[0].role is 'usr'")
    expected = {
        "an error": run.code not in (0, None),
        "exit code 2 of a rank": bool(re.search(r"exitcode\s*: 2", run.log)),
        "the row named, first": 0 <= cause < (run.log.find("Traceback") % len(run.log)),
        "no orphans": not run.processes(),
    }
    yield check("a bad row", run, expected, seconds=run.ended - run.started)

    file = write_rows(lab.folder / "odd.jsonl", make_rows(39))
    settings = {"train_file": str(file), "max_steps": -1, "num_train_epochs": 1}
    run = lab.start("odd", **settings, **TWO_RANKS).wait()
    seen = Counter(sample for samples in lab.batches(run.folder).values() for sample in samples)
    expected = {"exit code 0": run.code == 0, "all 39 rows": len(seen) == 39}
    yield check("39 rows", run, expected, rows_twice=sum(seen.values()) - 39)


def slow_rank_zero(lab: Lab) -> Iterator[Check]:
    seconds, timeout = (90, 30) if lab.share == 1 else (12, 4)
    fault = {"at": "component.data.dataset.fill_store", "rank": 0, "do": "sleep", "seconds": seconds}
    settings = {"ddp_timeout": timeout, "cache_dir": str(lab.folder / "cache")}
    run = lab.start("run", [fault], **settings, **TWO_RANKS).wait(240)
    waited = {"data_seconds": seconds, "timeout_seconds": timeout}
    yield exactly(lab, "slow data", run, lab.reference(**TWO_RANKS), **waited)


def restarts(lab: Lab) -> Iterator[Check]:
    for number in range(max(1, round(3 * lab.share))):
        name = f"run-{number}"
        fault = {
            "at": FORWARD[lab.program],
            "nth": 5,
            "rank": 1,
            "do": "kill",
            "once": str(lab.folder / f"once-{name}"),
        }
        run = lab.start(name, [fault], torchrun=["--max-restarts=1"], **TWO_RANKS).wait()
        again = lab.start(name, **TWO_RANKS).wait() if run.code else run
        facts = {"restarted by torchrun": "no" if run.code else "yes"}
        yield exactly(lab, f"try {number + 1}", again, lab.reference(**TWO_RANKS), **facts)


READER, DATASET, FORMATS = (f"tests/component/data/test_{name}.py" for name in ("reader", "dataset", "formats"))
TEMPLATE, CHAT_TEMPLATE = "tests/component/data/test_render.py", "tests/component/data/test_chat_template.py"
JOB, ARGUMENT, MEMORY = (
    "tests/test_train_qlora.py",
    "tests/component/settings/test_load.py",
    "tests/component/kernel/test_memory.py",
)
BAD_LINE = f"{READER}::test_a_bad_line_is_named_and_the_next_is_read"

GROUPS = {
    1: "A. Checkpoint safety",
    10: "B. Exact resume",
    16: "C. Signals",
    19: "D. Data",
    30: "E. Numerics",
    35: "F. torchrun, gloo, two processes",
    45: "G. Security",
}
CASES = (
    Case(
        1,
        "SIGKILL after each call of a save, before and after the rename, in rotation, and at 100 random times",
        "resume from the last complete checkpoint; lost steps at most save_steps; exact",
        kills_in_saves,
        stock=True,
    ),
    Case(
        2,
        "each of 5 files halved; one byte of each flipped",
        "found, moved aside, back to the one before; exact",
        damaged_files,
        stock=True,
    ),
    Case(3, "`optimizer.pt` deleted", "refused without an explicit flag", missing_optimizer, stock=True),
    Case(
        4,
        "random states deleted; a 2-rank checkpoint on 1 rank",
        "refused, or a warning that it is not exact",
        missing_random_state,
        earlier="silent; 0.0099",
    ),
    Case(
        5,
        "files of at most 12 kB from step 8 on; 1 MiB tmpfs; 64 KiB tmpfs",
        "old checkpoint intact; error names path, written, free; refused beforehand where hopeless; exact with room",
        full_disk,
        stock=True,
    ),
    Case(6, "good 3 and partial 9; from 3 on, saves 6, limit 2", "3 and 6 kept", partial_checkpoint, stock=True),
    Case(7, "stale empty `checkpoint-999`, equal times, limit 1", "own save kept", stale_checkpoint, stock=True),
    Case(
        8,
        "strace of saves; SIGKILL in the final export",
        "fsync, rename, fsync, delete; `final` old or new, never half; exact",
        export_and_order,
    ),
    Case(
        9,
        "read-only folder; another run's folder; two runs in one folder",
        "refused within 5 s, before the model loads",
        refused_folders,
    ),
    Case(
        10,
        "SIGKILL at step 1, in both epochs, between them and at the last step, 0 and 2 workers, dropout; on a GPU, "
        "AdamW, paged 32-bit and 8-bit",
        "all as uninterrupted",
        kills_everywhere,
        earlier="0.0 where tried",
    ),
    Case(11, "the same with length grouping", "all as uninterrupted", length_grouping, stock=True),
    Case(12, "20 kills and resumes of one run", "all as uninterrupted; no sample twice or left out", twenty_cycles),
    Case(
        13,
        "negative control: resumed without skipping the data seen",
        "differs, so that differences would be seen",
        without_skipping,
    ),
    Case(
        14,
        "seed, learning rate, data, template or base changed on resume",
        "refused unless asked for",
        changed_runs,
        stock=True,
    ),
    Case(15, "two fresh runs with one seed", "identical", two_fresh_runs, earlier="0.0"),
    Case(
        16,
        "SIGTERM in a slow forward",
        "the update is finished, then saved; exit 143; exact",
        term_in_forward,
        stock=True,
    ),
    Case(
        17,
        "SIGTERM, SIGINT, SIGHUP in load, tokenise, step, eval, save, export",
        "exit 143, 130, 129; no `final`; exact on resume",
        signals_in_stages,
        stock=True,
    ),
    Case(18, "a second SIGINT", "exit within 1 s, old checkpoint safe", second_interrupt),
    Case(
        19,
        "bad JSON on line k; last line cut",
        "exit 2, file:line:column, before the model loads; or rejected and counted",
        tests=(
            f"{JOB}::test_bad_lines_and_no_lines_stop_before_the_model_loads",
            f"{JOB}::test_rejected_rows_are_written_beside_the_run",
        ),
    ),
    Case(
        20,
        "BOM, CRLF, blank lines, U+2028, NEL",
        "the tokens of the clean file",
        tests=(
            f"{READER}::test_bom_crlf_blank_lines_and_unicode_separators_change_nothing",
            f"{DATASET}::test_bom_crlf_blank_lines_and_separators_change_no_token",
        ),
    ),
    Case(21, "invalid UTF-8; a lone surrogate", "an error with the line", tests=(BAD_LINE,)),
    Case(22, "duplicate key, NaN, 5,000-digit int, 100k nesting", "an error with the line", tests=(BAD_LINE,)),
    Case(
        23,
        "a line of 200 MB",
        "refused in bounded memory",
        tests=(f"{READER}::test_a_line_of_200_mb_is_refused_in_bounded_memory",),
    ),
    Case(
        24,
        "empty, blank or all-filtered file",
        "a clear error, exit 2",
        tests=(
            f"{JOB}::test_bad_lines_and_no_lines_stop_before_the_model_loads",
            f"{DATASET}::test_nothing_left_to_learn_is_an_error",
        ),
    ),
    Case(
        25,
        "20 bad rows, 6 unusual but legal ones",
        "a reason for each bad row; the legal ones load",
        tests=(
            f"{DATASET}::test_twenty_faulty_rows_are_rejected_and_six_unusual_ones_are_not",
            f"{FORMATS}::test_a_bad_row_is_named_with_its_field",
        ),
    ),
    Case(
        26,
        "prompt longer than the limit; nothing to learn",
        "dropped, counted; stop above a share",
        tests=(
            f"{DATASET}::test_no_item_is_without_a_learned_token",
            f"{DATASET}::test_a_share_of_bad_rows_above_the_limit_stops",
        ),
    ),
    Case(
        27,
        "control strings in content, names, arguments, system",
        "text, no control tokens",
        tests=(
            f"{CHAT_TEMPLATE}::test_control_tokens_in_text_are_text",
            f"{CHAT_TEMPLATE}::test_control_tokens_in_calls_results_and_tools_are_text",
        ),
    ),
    Case(
        28,
        "200 conversations: training against inference",
        "the same prefix",
        tests=(
            f"{TEMPLATE}::test_the_training_prefix_of_every_answer_is_the_inference_prompt",
            f"{CHAT_TEMPLATE}::test_the_prefix_of_every_answer_is_what_inference_shows",
        ),
    ),
    Case(
        29,
        "every item hashed over 3 epochs, 0 and 2 workers",
        "nothing changes",
        tests=(f"{DATASET}::test_items_are_the_same_in_every_epoch",),
    ),
    Case(
        30,
        "NaN in a LoRA weight at step 5; Inf in a gradient; learning rate 1e20",
        "exit 3 before the update; nothing bad saved",
        bad_numbers,
        stock=True,
    ),
    Case(
        31,
        "batch of 4; 4 accumulated batches of 1; 2 ranks of 2",
        "equal within 1e-6",
        accumulation_and_ranks,
        earlier="4.8e-7, 1 rank",
    ),
    Case(
        32,
        "fp16 asked for; no bfloat16",
        "trained weights in float32; an error before loading",
        tests=(
            f"{ARGUMENT}::test_without_cuda_half_precision_and_paged_optimizers_fall_back_and_say_so",
            f"{ARGUMENT}::test_the_card_decides_the_compute_dtype",
            f"{JOB}::test_a_run_leaves_an_adapter_a_tokenizer_and_a_picture_and_no_pickle",
        ),
    ),
    Case(
        33,
        "an adapter merged in float32; into 4 bits",
        "logits within 1e-5; refused",
        earlier="1.7e-7; 0.052",
        tests=("tests/script/test_merge_lora.py",),
    ),
    Case(
        34,
        "no memory for the longest row",
        "found before the first step, with advice",
        tests=(
            f"{MEMORY}::test_a_plan_that_fails_its_probe_gives_way_to_the_next",
            f"{MEMORY}::test_where_nothing_fits_the_remedies_are_named",
            f"{JOB}::test_a_card_that_is_too_small_ends_with_exit_code_2_and_the_remedies",
        ),
    ),
    Case(
        35, "SIGKILL of rank 1, relaunch", "the job ends within 30 s, no orphans; exact", one_killed, earlier="1 s; 0.0"
    ),
    Case(36, "SIGTERM of rank 1 alone", "both save the same update and leave; exact", one_signalled, stock=True),
    Case(37, "SIGKILL of torchrun", "no orphans; exact on relaunch", agent_killed, earlier="2 orphans for 10 min"),
    Case(
        38, "a bad row; 39 rows", "both leave, the cause first; all rows are used", bad_row_and_odd_rows, earlier="8 s"
    ),
    Case(39, "data that takes rank 0 90 s, ddp_timeout=30", "no timeout", slow_rank_zero),
    Case(40, "`--max-restarts=1`, SIGKILL of rank 1", "not promised; relaunched, exact", restarts, earlier="2/9"),
    Case(
        45,
        "pickles, hostile configurations, paths and secrets planted",
        "nothing runs: `.bin` weights give plain tensors or are refused by name, no other pickle is opened; nothing is "
        "written outside, nothing leaks",
        tests=("tests/test_trust.py", "tests/component/test_pickles.py"),
    ),
)
