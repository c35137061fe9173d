"""The cases of the reliability scorecard: what is injected, what is expected, and how it is seen.

A case is a function that starts runs in a Lab and yields a Check for each try; or, in SUITE, tests of the suite.
"""

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

from benchmark.lab import PRODUCT, STOCK, Lab, Launch, kill
from benchmark.runs import make_rows, write_rows

LOOP, FOLDER = "component.train.trainer.LoRATrainer", "component.run.folder.RunFolder"
# The functions that make an update, and one forward of it: here once an update, since four samples are one row.
UPDATE = {PRODUCT: f"{LOOP}.forward_and_backward", STOCK: "transformers.Trainer.training_step"}
FORWARD = {PRODUCT: f"{LOOP}.summed_loss", STOCK: "transformers.Trainer.compute_loss"}
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
        tries: yields the checks that are made with one seed.
        stock: whether the plain Trainer is tried too.
        earlier: what the plain Trainer did when it was last tried, where it is tried no more.
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


CASES: dict[int, Case] = {}
GROUPS = {  # by the number of their first case
    1: "A. Checkpoint safety",
    10: "B. Exact resume",
    16: "C. Signals",
    19: "D. Data",
    30: "E. Numerics",
    35: "F. torchrun, gloo, two processes",
    41: "G. Server and security",
}


def case(number: int, fault: str, expected: str, stock: bool = False, earlier: str = "") -> Callable:
    """Make a case of the function that yields its checks."""

    def add(tries: Callable[[Lab], Iterator[Check]]) -> Callable[[Lab], Iterator[Check]]:
        CASES[number] = Case(number, fault, expected, tries, stock, earlier)
        return tries

    return add


def check(name: str, run: Launch, expected: dict[str, bool], **facts: float | str) -> Check:
    facts = {key.replace("_", " "): value for key, value in facts.items()}
    return Check(name, [what for what, holds in expected.items() if not holds], facts, run.log)


def exactly(
    lab: Lab, name: str, run: Launch, reference: Path, expected: dict[str, bool] | None = None, **facts
) -> Check:
    """Check that a run ended, and ended with the numbers of the uninterrupted `reference`."""
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


def stopped(lab: Lab, name: str, update: int, **changes) -> Launch:
    """Have a run killed as `update` begins, so that it leaves the checkpoints before it."""
    run = lab.run(name, killed(UPDATE[lab.program], nth=update), **changes)
    if run.code != -signal.SIGKILL:
        raise RuntimeError(f"the run to be killed ended with {run.code}\n{run.log[-3000:]}")
    return run


def kept(folder: Path) -> str:
    """Steps of the checkpoints in an output folder."""
    return ", ".join(sorted((path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")), key=int))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


# A: checkpoint safety

SAVING = {  # the calls of a save: the function, and how the file begins by which this call of it is known
    "the folder": (f"{FOLDER}.begin", ""),
    "the adapter": ("peft.PeftModel.save_pretrained", ""),
    "the tokenizer": ("transformers.PreTrainedTokenizerBase.save_pretrained", ""),
    "the random states": ("torch.save", "/rng_state"),
    "optimizer.pt": ("torch.save", "/optimizer.pt"),
    "trainer_state.json": ("transformers.TrainerState.save_to_json", ""),
    "the manifest": ("component.run.folder.seal", ""),
    "the rename": ("os.rename", ""),
}
EXPORTING = ("the folder", "the adapter", "the tokenizer", "the manifest", "the rename")
ROTATING = {
    "between two fsyncs": {"at": "component.run.files.sync", "match": "checkpoint-6", "nth": 4},
    "before rotation": {"at": f"{FOLDER}.rotate", "nth": 3},
    "rotation, renamed": {"at": "os.rename", "match": ".tmp-checkpoint-3", "nth": 2, "after": True},
    "rotation, half deleted": {"at": "os.unlink", "match": "optimizer.pt"},
    "after rotation": {"at": f"{FOLDER}.rotate", "nth": 3, "after": True},
}
PLAIN_POINTS = ("after the adapter", "after optimizer.pt", "after the random states", "before trainer_state.json")


def around(calls: tuple[str, ...], folder: str) -> dict[str, dict]:
    """Points before and after each of these calls of a save to `folder`, as benchmark/faults.py takes them."""
    return {
        f"{when} {call}": {"at": SAVING[call][0], "match": folder + SAVING[call][1], "after": when == "after"}
        for call in calls
        for when in ("before", "after")
    }


@case(
    1,
    "SIGKILL after each call of a save, before and after the rename, in rotation, and at 100 random times",
    "resume from the last complete checkpoint; lost steps at most save_steps; exact",
    stock=True,
)
def kills_in_saves(lab: Lab) -> Iterator[Check]:
    points = around(tuple(SAVING), "checkpoint-6")
    points = points | ROTATING if lab.program == PRODUCT else {name: points[name] for name in PLAIN_POINTS}
    reference = lab.reference(save_total_limit=2)
    for number, name in enumerate(lab.some(list(points))):
        run = lab.run(f"save-{number}", killed(**points[name]), save_total_limit=2)
        again = lab.run(f"save-{number}", save_total_limit=2)
        lost = run.last_update() - again.first_step()
        expected = {"a kill": run.code == -signal.SIGKILL, "at most save_steps lost": lost <= 3}
        yield exactly(lab, name, again, reference, expected, lost_steps=lost)
    if lab.program == PRODUCT:
        yield from kills_at_random(lab)


def kills_at_random(lab: Lab) -> Iterator[Check]:
    """Kill one long run at random times, and start it again, until it is done."""
    kills = math.ceil(100 / lab.seeds * lab.share)
    settings = {"max_steps": 12 + 6 * kills, "save_steps": 2, "save_total_limit": 2, "logging_steps": 10}
    reference = lab.reference(**settings)
    draw = random.Random(lab.seed)
    begun, startup, trained = 0, 0.5, 0
    for number in range(kills):
        run = lab.start("random", **settings)
        if number == 0:
            run.wait_for(run.last_update)
            startup = time.time() - run.started
        time.sleep(draw.uniform(0.3, 1.5) * startup)
        kill(run.process.pid)
        run.wait()
        lost = begun - run.first_step() if run.last_update() else 0
        begun, trained = max(run.last_update(), begun - lost), trained + bool(run.last_update())
        expected = {"a kill": run.code == -signal.SIGKILL, "at most save_steps lost": lost <= 2}
        yield check(f"random kill {number + 1}", run, expected, lost_steps=lost)
    last = lab.run("random", **settings)
    lost = begun - last.first_step()
    facts = {"lost_steps": lost, "random kills in training": trained}
    yield exactly(lab, "after all random kills", last, reference, {"at most save_steps lost": lost <= 2}, **facts)


FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@case(
    2,
    "each of 5 files halved; one byte of each flipped",
    "found, moved aside, back to the one before; exact",
    stock=True,
)
def damaged_files(lab: Lab) -> Iterator[Check]:
    reference, base = lab.reference(), stopped(lab, "base", 8)
    for name in lab.some(FILES):
        for damage in ("halved", "one byte flipped"):
            folder = lab.folder / f"{name}-{damage[:3]}"
            shutil.copytree(base.folder, folder)
            lab.launches[folder] = [base]
            path = folder / "checkpoint-6" / name
            content = bytearray(path.read_bytes())
            middle = len(content) // 2
            content[middle] ^= 1
            path.write_bytes(content[:middle] if damage == "halved" else content)
            run = lab.run(folder.name)
            expected = {
                "back to checkpoint-3": run.first_step() == 3,
                "checkpoint-6 moved aside": any(folder.glob("aside/checkpoint-6.*")),
            }
            yield exactly(lab, f"{name} {damage}", run, reference, expected)


def missing_file(lab: Lab, pattern: str) -> Iterator[Check]:
    """Check that a checkpoint without a file is refused, and is used, with a warning, where that is asked for."""
    folder = stopped(lab, f"without-{pattern[:3]}", 5).folder
    for path in (folder / "checkpoint-3").glob(pattern):
        path.unlink()
    run = lab.run(folder.name)
    facts = {"adapter diff": lab.compare(folder, lab.reference())["adapter"]} if run.code == 0 else {}
    yield check("refused", run, {"exit code 4": run.code == 4}, exit_code=run.code, **facts)
    if lab.program == PRODUCT:
        given = {"resume_from_checkpoint": str(folder / "checkpoint-3"), "resume_despite_changes": True}
        yield warned("used on request", lab.run(folder.name, **given))


def warned(name: str, run: Launch) -> Check:
    return check(name, run, {"exit code 0": run.code == 0, "a warning": "not exact" in run.log})


@case(3, "`optimizer.pt` deleted", "refused without an explicit flag", stock=True)
def missing_optimizer(lab: Lab) -> Iterator[Check]:
    yield from missing_file(lab, "optimizer.pt")


@case(
    4,
    "random states deleted; a 2-rank checkpoint on 1 rank",
    "refused, or a warning that it is not exact",
    earlier="silent; 0.0099",
)
def missing_random_state(lab: Lab) -> Iterator[Check]:
    yield from missing_file(lab, "rng_state*")
    if lab.seed:
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
    """Mount a small file system of memory at `folder`; False where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@case(
    5,
    "files of at most 12 kB from step 8 on; 1 MiB tmpfs; 64 KiB tmpfs",
    "old checkpoint intact; error names path, written, free; refused beforehand where hopeless; exact with room",
    stock=True,
)
def full_disk(lab: Lab) -> Iterator[Check]:
    reference = lab.reference()
    folder = stopped(lab, "limit", 8).folder
    before = digests(folder / "checkpoint-6")
    run = lab.run("limit", [{"at": UPDATE[lab.program], "do": "limit files", "bytes": 12_000}])
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
                expected = {"exit code 4": run.code == 4, "no update": not run.last_update(), "need": "need" in run.log}
                yield check("preflight on 64 KiB", run, expected, exit_code=run.code)


def storage_error(name: str, run: Launch, checkpoint: Path, before: dict[str, str]) -> Check:
    expected = {
        "exit code 4": run.code == 4,
        "a path": f"{run.folder}/checkpoint-" in run.log,
        "what was written": "could not be written" in run.log,
        "what is free": " free" in run.log,
        "the old checkpoint as it was": bool(before) and digests(checkpoint) == before,
    }
    return check(name, run, expected, exit_code=run.code)


@case(
    8,
    "strace of saves; SIGKILL in the final export",
    "fsync, rename, fsync, delete; `final` old or new, never half; exact",
)
def export_and_order(lab: Lab) -> Iterator[Check]:
    from safetensors.torch import load_file

    reference, points = lab.reference(), around(EXPORTING, "final")
    for number, name in enumerate(lab.some(list(points))):
        run = lab.run(f"export-{number}", killed(**points[name]))
        final = run.folder / "final"
        loads = not final.exists() or bool(load_file(final / "adapter_model.safetensors"))
        again = lab.run(f"export-{number}")
        expected = {
            "a kill": run.code == -signal.SIGKILL,
            "all updates made": run.last_update() == 12,
            "old or new": loads,
        }
        yield exactly(lab, f"final, {name}", again, reference, expected)
    if lab.seed == 0 and shutil.which("strace"):
        trace = lab.folder / "trace"
        calls = "trace=openat,fsync,rename,renameat,renameat2,unlink,unlinkat,rmdir"
        prefix = ["strace", "-f", "-y", "--seccomp-bpf", "-s", "4096", "-e", calls, "-o", str(trace)]
        run = lab.start("traced", prefix=prefix, save_total_limit=2).wait(240)
        renamed, violations = violations_of_order(trace, run.folder)
        expected = {"exit code 0": run.code == 0, "4 checkpoints and a final": renamed == 5, "order": not violations}
        result = check("strace", run, expected, violations=len(violations))
        result.log += "\n".join(violations)
        yield result


WRITTEN = re.compile(
    r'openat\(.*?"([^"]+)", [A-Z_|]*O_CREAT|fsync\(\d+<([^>]+)>|rename(?:at2?)?\([^"]*"([^"]+)",[^"]*"([^"]+)"'
)
DELETED = re.compile(r'(?:unlinkat|rmdir|unlink)\((?:\d+<([^>]+)>|AT_FDCWD\S*)?,? ?"([^"]+)"')


def violations_of_order(trace: Path, folder: Path) -> tuple[int, list[str]]:
    """Count the folders that a traced run published, and name what broke the order: the folder's files and itself are
    synced, it is renamed, its parent is synced, and only then is anything deleted."""
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


# B: exact resume

PLACES = {"step 1": 2, "mid-epoch 1": 5, "boundary": 7, "mid-epoch 2": 10, "last": 12}  # the update that is killed


@case(
    10,
    "SIGKILL at step 1, in both epochs, between them and at the last step, 0 and 2 workers, dropout; on a GPU, AdamW, "
    "paged 32-bit and 8-bit",
    "all as uninterrupted",
    earlier="0.0 where tried",
)
def kills_everywhere(lab: Lab) -> Iterator[Check]:
    """Try each optimizer and number of workers; on a GPU all at once, since a run takes long to start there."""
    optimizers = ["adamw_torch"] if lab.device == "cpu" else ["adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit"]
    settings = [(optim, workers) for optim in optimizers for workers in (0, 2)]
    with ThreadPoolExecutor(len(settings)) as pool:
        for checks in (map if lab.device == "cpu" else pool.map)(lambda each: list(kills_with(lab, *each)), settings):
            yield from checks


def kills_with(lab: Lab, optim: str, workers: int) -> Iterator[Check]:
    settings = {"optim": optim, "dataloader_num_workers": workers}
    reference = lab.reference(**settings)
    for place in lab.some(list(PLACES)):
        update = PLACES[place]
        name = f"{optim}-{workers}-{update}"
        stopped(lab, name, update, save_steps=1, **settings)
        run = lab.run(name, save_steps=1, **settings)
        expected = {"from where it was": run.first_step() == update - 1}
        yield exactly(lab, f"{place}, {optim}, {workers} workers", run, reference, expected)


@case(11, "the same with length grouping", "all as uninterrupted", stock=True)
def length_grouping(lab: Lab) -> Iterator[Check]:
    settings = {"train_sampling_strategy": "group_by_length", "packing": False, "per_device_train_batch_size": 3}
    reference = lab.reference(**settings)
    for update in (5, 11):
        stopped(lab, f"run-{update}", update, **settings)
        yield exactly(lab, f"killed at {update}", lab.run(f"run-{update}", **settings), reference)


@case(12, "20 kills and resumes of one run", "all as uninterrupted; no sample twice or left out")
def twenty_cycles(lab: Lab) -> Iterator[Check]:
    cycles = round(20 * lab.share)
    settings = {"max_steps": 2 * cycles + 2, "save_steps": 1, "save_total_limit": 2}
    reference = lab.reference(**settings)
    for _ in range(cycles):
        stopped(lab, "run", 3, **settings)
    run = lab.run("run", **settings)
    wrong = lab.repeated_and_skipped(run.folder)
    expected = {"every sample once an epoch": wrong == 0, "from the last kill": run.first_step() == 2 * cycles}
    yield exactly(lab, f"{cycles} cycles", run, reference, expected, repeated_and_skipped=wrong)


@case(
    13,
    "negative control: resumed without skipping the data seen",
    "differs, so that differences would be seen",
)
def without_skipping(lab: Lab) -> Iterator[Check]:
    stopped(lab, "run", 5)
    run = lab.run("run", ignore_data_skip=True, resume_despite_changes=True)
    differences = lab.compare(run.folder, lab.reference())
    expected = {key: differences[key] > 0 for key in ("adapter", "batches")}
    facts = {f"{key} diff": differences[key] for key in ("adapter", "batches")}
    yield check("data not skipped", run, {"exit code 0": run.code == 0} | expected, **facts)


@case(15, "two fresh runs with one seed", "identical", earlier="0.0")
def two_fresh_runs(lab: Lab) -> Iterator[Check]:
    yield exactly(lab, "a second run", lab.run("again"), lab.reference())


# C: signals

SLOW = {PRODUCT: 0.5, STOCK: 4}  # seconds of a forward in which a signal comes; the plain Trainer heeds it after 3
STAGES = {
    "load": {"at": "component.model.load_model"},
    "tokenise": {"at": "component.data.dataset.fill_store", "after": True},
    "step": {"at": FORWARD[PRODUCT], "nth": 5},
    "eval": {"at": f"{LOOP}.evaluate"},
    "save": {"at": "torch.save", "match": "checkpoint-6/rng_state"},
    "export": {"at": "peft.PeftModel.save_pretrained", "match": ".tmp-final"},
}


def just_in_time(lab: Lab) -> dict:
    """The setting by which the plain Trainer answers signals."""
    return {"enable_jit_checkpoint": True} if lab.program == STOCK else {}


@case(16, "SIGTERM in a slow forward", "the update is finished, then saved; exit 143; exact", stock=True)
def term_in_forward(lab: Lab) -> Iterator[Check]:
    fault = {"at": FORWARD[lab.program], "nth": 5, "do": "signal", "signal": "SIGTERM", "seconds": SLOW[lab.program]}
    run = lab.run("run", [fault], save_steps=100, **just_in_time(lab))
    expected = {"exit code 143": run.code == 143, "checkpoint-5": kept(run.folder) == "5"}
    again = lab.run("run", save_steps=100, **just_in_time(lab))
    expected["from checkpoint-5"] = again.first_step() == 5
    yield exactly(lab, "resumed", again, lab.reference(), expected, seconds=run.since_fault())


@case(
    17,
    "SIGTERM, SIGINT, SIGHUP in load, tokenise, step, eval, save, export",
    "exit 143, 130, 129; no `final`; exact on resume",
    stock=True,
)
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
            facts = {"seconds": run.since_fault()} | ({"exit code": run.code} if lab.program == STOCK else {})
            yield exactly(lab, f"{signum.name} in {stage}", lab.run(name, **own), reference, expected, **facts)


@case(18, "a second SIGINT", "exit within 1 s, old checkpoint safe")
def second_interrupt(lab: Lab) -> Iterator[Check]:
    run = lab.start("run", [{"at": FORWARD[lab.program], "nth": 5, "do": "sleep", "seconds": 20}])
    run.wait_for(lambda: run.records("fault"))
    for pause in (0.3, 0):
        kill(run.process.pid, signal.SIGINT)
        time.sleep(pause)
    second = time.time()
    seconds = run.wait().ended - second
    expected = {"exit code 130": run.code == 130, "less than 1 s": seconds < 1, "checkpoint-3": kept(run.folder) == "3"}
    yield exactly(lab, "resumed", lab.run("run"), lab.reference(), expected, seconds=seconds)


# E: numerics


@case(
    30,
    "NaN in a LoRA weight at step 5; Inf in a gradient; learning rate 1e20",
    "exit 3 before the update; nothing bad saved",
    stock=True,
)
def bad_numbers(lab: Lab) -> Iterator[Check]:
    update = UPDATE[lab.program]
    faults = {
        "NaN in a weight": [{"at": update, "nth": 5, "do": "spoil weight"}],
        "Inf in a gradient": [{"at": update, "nth": 5, "after": True, "do": "spoil gradient"}],
        "learning rate 1e20": [],
    }
    for name, injected in faults.items():
        run = lab.run(name.replace(" ", "-"), injected, **({} if injected else {"learning_rate": 1e20}))
        bad = bad_tensors(run.folder)
        expected = {"exit code 3": run.code == 3, "nothing bad saved": not bad}
        facts = {"NaN tensors on disk": bad, "exit code": run.code}
        if injected:
            facts["steps to stop"] = run.last_update() - 5
            expected["a stop at once"] = not facts["steps to stop"]
        yield check(name, run, expected, **facts)
    if lab.program == PRODUCT:
        run = lab.run("skipped", faults["Inf in a gradient"], max_skipped_updates=1)
        expected = {"exit code 0": run.code == 0, "nothing bad saved": not bad_tensors(run.folder)}
        yield check("one left out on request", run, expected | {"a warning": "left out, 1 of" in run.log})
    if lab.program == PRODUCT and lab.device == "cpu":
        fault = {"at": f"{LOOP}.log_evaluate_save", "nth": 3, "rank": 1, "do": "spoil weight"}
        run = lab.run("one-rank", [fault], **TWO_RANKS)
        expected = {"an error": bool(run.code), "the cause told": "others are not finite" in run.log}
        facts = {"NaN tensors on disk": bad_tensors(run.folder)}
        yield check("NaN on one rank of two", run, expected | {"nothing saved": not kept(run.folder)}, **facts)


def bad_tensors(folder: Path) -> int:
    """Count the tensors on disk, of adapters and optimizer states, that have a figure that is not finite."""
    import torch
    from safetensors.torch import load_file

    tensors = [tensor for path in folder.rglob("*.safetensors") for tensor in load_file(path).values()]
    for path in folder.rglob("optimizer.pt"):
        states = torch.load(path, weights_only=True, map_location="cpu")["state"].values()
        tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(not tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point())


# F: two processes under torchrun


@case(35, "SIGKILL of rank 1, relaunch", "the job ends within 30 s, no orphans; exact", earlier="1 s; 0.0")
def one_killed(lab: Lab) -> Iterator[Check]:
    run = lab.run("run", killed(FORWARD[lab.program], nth=5, rank=1), **TWO_RANKS)
    seconds, orphans = run.since_fault(1), len(run.processes())
    expected = {"less than 30 s": seconds < 30, "no orphans": not orphans, "an error": run.code not in (0, None)}
    facts = {"seconds": seconds, "orphans": orphans}
    yield exactly(lab, "relaunched", lab.run("run", **TWO_RANKS), lab.reference(**TWO_RANKS), expected, **facts)


@case(36, "SIGTERM of rank 1 alone", "both save the same update and leave; exact", stock=True)
def one_signalled(lab: Lab) -> Iterator[Check]:
    fault = {"at": FORWARD[lab.program], "nth": 5, "rank": 1, "do": "signal", "signal": "SIGTERM"}
    fault["seconds"] = SLOW[lab.program]
    run = lab.start("run", [fault], save_steps=100, **TWO_RANKS, **just_in_time(lab)).wait(45)
    seconds, orphans = run.since_fault(1), len(run.processes())
    end = "when killed" if "killed after" in run.log else "by itself"
    expected = {
        "less than 10 s": seconds < 10,
        "no orphans": not orphans,
        "143, and nobody killed": bool(re.search(r"exitcode\s*: 143", run.log)) and end == "by itself",
        "checkpoint-5": kept(run.folder) == "5",
    }
    facts = {"ended": end, "seconds": seconds, "orphans": orphans, "kept": kept(run.folder)}
    if lab.program == STOCK:
        yield check("SIGTERM to rank 1", run, expected, **facts)
        return
    again = lab.run("run", save_steps=100, **TWO_RANKS)
    yield exactly(lab, "relaunched", again, lab.reference(**TWO_RANKS), expected, **facts)


@case(37, "SIGKILL of torchrun", "no orphans; exact on relaunch", earlier="2 orphans for 10 min")
def agent_killed(lab: Lab) -> Iterator[Check]:
    run = lab.start("run", [{"at": FORWARD[lab.program], "nth": 5, "do": "sleep", "seconds": 60}], **TWO_RANKS)
    run.wait_for(lambda: run.records("fault"))
    kill(run.process.pid)
    began = time.time()
    while (alive := len(run.processes())) and time.time() < began + 10:
        time.sleep(0.05)
    facts = {"orphans": alive, "seconds": time.time() - began}
    for pid in run.processes():
        kill(pid)
    again = lab.run("run", **TWO_RANKS)
    yield exactly(lab, "relaunched", again, lab.reference(**TWO_RANKS), {"no orphans": alive == 0}, **facts)


@case(38, "a bad row; 39 rows", "both leave, the cause first; all rows are used", earlier="8 s")
def bad_row_and_odd_rows(lab: Lab) -> Iterator[Check]:
    bad = {"conversations": [{"role": "usr", "content": "x"}]}
    file = write_rows(lab.folder / "bad.jsonl", [*make_rows(23), bad])
    run = lab.run("bad", train_file=str(file), **TWO_RANKS)
    cause = run.log.find(f"{file}:24: conversations[0].role is 'usr'")
    expected = {
        "an error": run.code not in (0, None),
        "exit code 2 of a rank": bool(re.search(r"exitcode\s*: 2", run.log)),
        "the row named, first": 0 <= cause < (run.log.find("Traceback") % len(run.log)),
        "no orphans": not run.processes(),
    }
    yield check("a bad row", run, expected, seconds=run.ended - run.started)

    file = write_rows(lab.folder / "odd.jsonl", make_rows(39))
    run = lab.run("odd", train_file=str(file), max_steps=-1, num_train_epochs=1, **TWO_RANKS)
    seen = Counter(sample for samples in lab.batches(run.folder).values() for sample in samples)
    expected = {"exit code 0": run.code == 0, "all 39 rows": len(seen) == 39}
    yield check("39 rows", run, expected, rows_twice=sum(seen.values()) - 39)


@case(40, "`--max-restarts=1`, SIGKILL of rank 1", "not promised; relaunched, exact", earlier="2/9")
def restarts(lab: Lab) -> Iterator[Check]:
    for number in range(max(1, round(3 * lab.share))):
        name = f"run-{number}"
        faults = killed(FORWARD[lab.program], nth=5, rank=1, once=str(lab.folder / f"once-{name}"))
        run = lab.run(name, faults, torchrun=["--max-restarts=1"], **TWO_RANKS)
        again = lab.run(name, **TWO_RANKS) if run.code else run
        facts = {"restarted by torchrun": "no" if run.code else "yes"}
        yield exactly(lab, f"try {number + 1}", again, lab.reference(**TWO_RANKS), **facts)


# Cases that tests of the suite are

READER, DATASET, FORMATS, RENDER, TEMPLATE = (
    f"tests/component/data/test_{name}.py" for name in ("reader", "dataset", "formats", "render", "chat_template")
)
SETTINGS, MEMORY = "tests/component/settings/test_load.py", "tests/component/kernel/test_memory.py"
JOB, RECOVERY, RUN_FOLDER = "tests/test_train_qlora.py", "tests/test_recovery.py", "tests/component/run/test_folder.py"
BAD_LINE = f"{READER}::test_a_bad_line_is_named_and_the_next_is_read"
NO_LINES = f"{JOB}::test_bad_lines_and_no_lines_stop_before_the_model_loads"
OTHER_RUN = f"{RECOVERY}::test_another_run_in_the_folder_is_refused_before_the_model_loads"

SUITE = {  # (number, fault, expected): tests
    (6, "good 10 and partial 20; goes on, saves 15, limit 2", "10 and 15 kept"): (
        f"{RUN_FOLDER}::test_a_partial_checkpoint_is_neither_kept_as_a_good_one_nor_deleted",
        f"{RUN_FOLDER}::test_a_given_checkpoint_is_gone_on_from_once_and_the_same_command_continues",
    ),
    (7, "stale empty `checkpoint-999`, limit 2", "own saves kept"): (
        f"{RUN_FOLDER}::test_rotation_touches_nothing_of_others_and_counts_nothing_broken",
    ),
    (9, "no folder to write to; another run's folder; two runs in one folder", "refused before the model loads"): (
        f"{RUN_FOLDER}::test_a_folder_that_cannot_be_made_is_named",
        f"{RUN_FOLDER}::test_one_folder_has_one_run_and_a_killed_one_lets_go",
        OTHER_RUN,
    ),
    (14, "seed, learning rate, data, template or base changed on resume", "refused unless asked for"): (
        f"{RECOVERY}::test_another_base_model_is_another_run",
        f"{RECOVERY}::test_settings_changed_on_request_are_those_of_the_next_update",
        OTHER_RUN,
    ),
    (
        19,
        "bad JSON on line k; last line cut",
        "exit 2, file:line:column, before the model loads; or rejected and counted",
    ): (NO_LINES, f"{JOB}::test_rejected_rows_are_written_beside_the_run"),
    (20, "BOM, CRLF, blank lines, U+2028, NEL", "the tokens of the clean file"): (
        f"{READER}::test_bom_crlf_blank_lines_and_unicode_separators_change_nothing",
        f"{DATASET}::test_bom_crlf_blank_lines_and_separators_change_no_token",
    ),
    (21, "invalid UTF-8; a lone surrogate", "an error with the line"): (BAD_LINE,),
    (22, "duplicate key, NaN, 5,000-digit int, 100k nesting", "an error with the line"): (BAD_LINE,),
    (23, "a line of 200 MB", "refused in bounded memory"): (
        f"{READER}::test_a_line_of_200_mb_is_refused_in_bounded_memory",
    ),
    (24, "empty, blank or all-filtered file", "a clear error, exit 2"): (
        f"{DATASET}::test_nothing_left_to_learn_is_an_error",
        NO_LINES,
    ),
    (25, "20 bad rows, 6 unusual but legal ones", "a reason for each bad row; the legal ones load"): (
        f"{DATASET}::test_twenty_faulty_rows_are_rejected_and_six_unusual_ones_are_not",
        f"{FORMATS}::test_a_bad_row_is_named_with_its_field",
    ),
    (26, "prompt longer than the limit; nothing to learn", "dropped, counted; stop above a share"): (
        f"{DATASET}::test_no_item_is_without_a_learned_token",
        f"{DATASET}::test_a_share_of_bad_rows_above_the_limit_stops",
    ),
    (27, "control strings in content, names, arguments, system", "text, no control tokens"): (
        f"{TEMPLATE}::test_control_tokens_in_text_are_text",
        f"{TEMPLATE}::test_control_tokens_in_calls_results_and_tools_are_text",
    ),
    (28, "200 conversations: training against inference", "the same prefix"): (
        f"{RENDER}::test_the_training_prefix_of_every_answer_is_the_inference_prompt",
        f"{TEMPLATE}::test_the_prefix_of_every_answer_is_what_inference_shows",
    ),
    (29, "every item hashed over 3 epochs, 0 and 2 workers", "nothing changes"): (
        f"{DATASET}::test_items_are_the_same_in_every_epoch",
    ),
    (31, "batch of 4; 4 accumulated batches of 1; 1 to 4 ranks", "equal within 1e-6; of ranks within 1e-5"): (
        f"{JOB}::test_four_accumulated_batches_of_one_equal_one_batch_of_four",
        f"{JOB}::test_two_ranks_equal_one_process_with_the_same_global_batch",
        "tests/component/train/test_ranks.py::test_any_number_of_processes_trains_as_one_does",
    ),
    (32, "fp16 asked for; no bfloat16", "trained weights in float32; an error before loading"): (
        f"{SETTINGS}::test_without_cuda_half_precision_and_paged_optimizers_fall_back_and_say_so",
        f"{SETTINGS}::test_the_card_decides_the_compute_dtype",
        f"{JOB}::test_a_run_leaves_an_adapter_a_tokenizer_and_a_picture_and_no_pickle",
    ),
    (33, "an adapter merged in float32; into 4 bits", "logits within 1e-5; refused"): (
        "tests/script/test_merge_lora.py",
    ),
    (34, "no memory for the longest row", "found before the first step, with advice"): (
        f"{MEMORY}::test_a_plan_that_fails_its_probe_gives_way_to_the_next",
        f"{MEMORY}::test_where_nothing_fits_the_remedies_are_named",
        f"{JOB}::test_a_card_that_is_too_small_ends_with_exit_code_2_and_the_remedies",
    ),
    (39, "data that takes rank 0 12 s, ddp_timeout=10", "no timeout"): (
        f"{JOB}::test_ranks_wait_for_slow_data_longer_than_a_collective_may_take",
    ),
    (
        45,
        "pickles, hostile configurations, paths and secrets planted",
        "nothing runs: `.bin` weights give plain tensors or are refused by name, no other pickle is opened; nothing is "
        "written outside, nothing leaks",
    ): ("tests/test_trust.py", "tests/component/test_pickles.py"),
}
EARLIER = {
    6: "kept 6, 9; 0.0704",
    7: "kept 999",
    14: "exit code 0",
    31: "4.8e-7, 1 rank",
    33: "1.7e-7; 0.052",
}
CASES |= {
    number: Case(number, fault, expected, earlier=EARLIER.get(number, ""), tests=tests)
    for (number, fault, expected), tests in SUITE.items()
}
