"""Training over several machines. Each is a torchrun agent on this one, with a home of its own, and where root allows
with a host's name, other folders under the same names, and a network of its own."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM

import train_qlora
from component.chatglm import ChatGLMConfig
from component.data.store import REPORT
from component.model import attach_lora
from component.run.resume import find_checkpoints
from component.settings.load import load_arguments
from component.settings.schema import QLoRAArguments

from .runs import ROWS, largest_difference, write_rows

ROOT = Path(__file__).parents[1]
SETTINGS = {"max_steps": 24, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "lora_rank": 4}
SETTINGS |= {"lora_dropout": 0.1, "logging_steps": 1, "save_strategy": "steps", "save_steps": 6}
NAMESPACES = ("unshare", "--mount", "--uts")
IS_ROOT = subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode == 0
READ_ONLY = "read only"
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can give a machine other folders under the same names")
needs_ip = pytest.mark.skipif(not (IS_ROOT and shutil.which("ip")), reason="a network of its own needs root and ip")


class Machine:
    """A torchrun agent and its processes.

    Args:
        name: of the host.
        home: a folder of its own, which holds its log.
        launch: options of torchrun, the program and its arguments.
        sees: folders, and which others lie there for this machine; READ_ONLY: the same, and it cannot write there.
        network: a network namespace.
    """

    def __init__(self, name: str, home: Path, launch: list[str], sees: dict[Path, Path | str], network: str = ""):
        self.log_file = home / "log"
        self.mark = f"{home} {time.time()}"
        home.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", *launch]
        if IS_ROOT:
            mounts = [
                f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}"
                if other == READ_ONLY
                else f"mount --bind {other} {folder}"
                for folder, other in sees.items()
            ]
            before = " && ".join([f"echo {name} > /proc/sys/kernel/hostname", *mounts, 'exec "$@"'])
            command = [*NAMESPACES, "sh", "-c", before, "sh", *command]
        if network:
            command = ["ip", "netns", "exec", network, *command]
        env = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(ROOT)}
        env |= {"GLOO_SOCKET_IFNAME": network or "lo", "OMP_NUM_THREADS": "1", "MARK": self.mark}
        with open(self.log_file, "w") as log:
            self.agent = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log:
            assert self.agent.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def processes(self) -> list[int]:
        """The agent and all that it started, of those that are alive."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                alive = "\nState:\tZ" not in (folder / "status").read_text()
                if alive and f"MARK={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                pass
        return found

    def kill(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.agent.wait()


def write_settings(folder: Path, name: str, checkpoint: Path, **changes) -> Path:
    """A file of settings, for a run on data that lies in `folder`, in output/NAME."""
    for part in ("output", "data", "cache", "empty"):
        (folder / part).mkdir(exist_ok=True)
    settings = {
        "output_dir": str(folder / "output" / name),
        "model_name_or_path": str(checkpoint),
        "train_file": str(write_rows(folder / "data/train.jsonl", ROWS)),
        "cache_dir": str(folder / "cache"),
    }
    file = folder / f"{name}.json"
    file.write_text(json.dumps(settings | SETTINGS | changes))
    return file


def run_alone(folder: Path, checkpoint: Path, processes: int, **changes) -> Path:
    """The output of a run on one machine."""
    file = write_settings(folder, "alone", checkpoint, **changes)
    launch = ["--nnodes=1", f"--nproc_per_node={processes}", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    launch += ["--local_addr=127.0.0.1", "train_qlora.py", "--train_args_file", str(file)]
    machine = Machine("machine-0", folder / "home-0", launch, {})
    assert machine.agent.wait(300) == 0, machine.log
    return folder / "output/alone"


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory) -> Path:
    """The output of one machine with two processes, which nothing interrupted."""
    return run_alone(tmp_path_factory.mktemp("alone"), checkpoint, 2)


@pytest.fixture
def start(checkpoint, tmp_path) -> Iterator[Callable[..., Machine]]:
    """Starts one of two machines: 1, which has rank 0 and the rendezvous, or 2. What is left at the end is killed."""
    machines: list[Machine] = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(number: int, processes=1, sees=None, restarts=0, network="", subnet="127.0.0", **changes) -> Machine:
        file = write_settings(tmp_path, "run", checkpoint, **changes)
        file = file.rename(tmp_path / f"settings-{number}.json")
        launch = options_of_the_page(f"{subnet}.1:{port}", processes)
        launch += [f"--max_restarts={restarts}"]
        launch += [f"--local_addr={subnet}.{number}"]  # by the order of these, ranks are numbered
        launch += [f"--rdzv_conf=is_host={int(number == 1)}", "train_qlora.py", "--train_args_file", str(file)]
        machines.append(Machine(f"machine-{number}", tmp_path / f"home-{number}", launch, sees or {}, network))
        return machines[-1]

    yield start
    for machine in machines:
        machine.kill()


def options_of_the_page(endpoint: str, processes: int) -> list[str]:
    """torchrun's of docs/several_machines.md, for this endpoint and number of processes."""
    (line,) = blocks("bash")
    options = re.findall(r" (--\S+?)(?==|\s)(\S*)", line.partition(" train_qlora.py ")[0] + " ")
    changed = {"--rdzv_endpoint": f"={endpoint}", "--nproc_per_node": f"={processes}"}
    assert changed.keys() < dict(options).keys()
    return [name + changed.get(name, value) for name, value in options]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs/several_machines.md").read_text(), re.DOTALL)


def end_well(*machines: Machine) -> None:
    for machine in machines:
        assert machine.agent.wait(300) == 0, "\n".join(other.log for other in machines)


def end_by_themselves(*machines: Machine, seconds: float = 60) -> float:
    """Seconds until these have failed by themselves, and left no process behind; printed for the page."""
    begun = time.monotonic()
    for machine in machines:
        assert machine.agent.wait(seconds) == 1, machine.log  # torchrun's code for any failure
    took = time.monotonic() - begun
    print(f"ended by themselves after {took:.1f} s")
    assert not [pid for machine in machines for pid in machine.processes()]
    return took


def assert_refused(code: int, text: str, *machines: Machine) -> None:
    """All ranks left with this exit code before the model was loaded, and each machine says why in one line."""
    end_by_themselves(*machines)
    for machine in machines:
        assert "loading" not in machine.log
        assert "mistake of Luciole" not in machine.log, machine.log
        assert len([line for line in machine.log.splitlines() if text in line]) == 1, machine.log
        codes = set(re.findall(r"exitcode  : (-?\d+)", machine.log))
        assert {str(code)} <= codes <= {str(code), "-15"}, machine.log  # torchrun ends the others when one has left


@pytest.mark.slow
def test_two_machines_end_with_the_adapter_of_one_with_two_processes(start, alone, tmp_path):
    first, second = start(1), start(2)
    end_well(first, second)
    assert largest_difference(alone, tmp_path / "output/run") == 0
    assert first.log.count("training from the base model") == 1
    (told,) = [line for line in second.log.splitlines() if "INFO" in line]
    assert re.search(r"rank 1 on \S+ has joined; the log is that of rank 0 on \S+", told)


@needs_root
@pytest.mark.slow
def test_an_output_folder_that_is_not_shared_is_told_on_both_machines(start, tmp_path):
    machines = start(1), start(2, sees={tmp_path / "output": tmp_path / "empty"})
    folder = tmp_path / "output/run"
    text = f"rank 1 on machine-2: output_dir {folder} is not the folder that rank 0 on machine-1 writes to"
    assert_refused(2, text, *machines)
    assert not folder.exists()
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.slow
def test_a_machine_that_dies_ends_the_other_and_both_go_on_as_if_nothing_had_been(start, alone, tmp_path):
    first, second = start(1), start(2)
    first.wait_for("step 8/24")
    second.agent.kill()
    assert end_by_themselves(first) < 30
    assert "rank 0 on" in first.log and "has lost another process of this run" in first.log
    assert "mistake of Luciole" not in first.log
    assert not second.processes()
    first, second = start(1), start(2)
    end_well(first, second)
    assert f"continuing from {tmp_path / 'output/run/checkpoint-6'}" in first.log
    assert largest_difference(alone, tmp_path / "output/run") == 0


@pytest.mark.slow
def test_the_machine_of_the_rendezvous_and_of_rank_0_may_die(start, alone, tmp_path):
    first, second = start(1), start(2)
    first.wait_for("step 8/24")
    first.agent.kill()
    assert end_by_themselves(second) < 30
    assert not first.processes()
    assert "mistake of Luciole" not in second.log
    end_well(start(1), start(2))
    assert largest_difference(alone, tmp_path / "output/run") == 0


@pytest.mark.slow
def test_machines_may_have_different_numbers_of_processes(start, checkpoint, tmp_path):
    one = run_alone(tmp_path, checkpoint, 3)
    end_well(start(1, processes=2), start(2))
    assert largest_difference(one, tmp_path / "output/run") == 0


@pytest.mark.slow
def test_a_machine_may_come_late(start, alone, tmp_path):
    first = start(1)
    time.sleep(20)
    end_well(first, start(2))
    assert largest_difference(alone, tmp_path / "output/run") == 0


@pytest.mark.slow
@pytest.mark.parametrize("asked", [1, 2])
def test_a_signal_to_one_machine_stops_both_after_the_same_step(start, alone, tmp_path, asked):
    machines = start(1), start(2)
    machines[0].wait_for("step 8/24")
    machines[asked - 1].agent.send_signal(signal.SIGTERM)
    for machine in machines:
        machine.agent.wait(60)
        assert not machine.processes()
    step = int(find_checkpoints(tmp_path / "output/run")[-1].name.partition("-")[2])
    assert 8 <= step < 24
    assert f"stopped at step {step} of 24; the same command continues" in machines[0].log
    end_well(start(1), start(2))
    assert largest_difference(alone, tmp_path / "output/run") == 0


@pytest.mark.slow
def test_torchrun_may_start_the_processes_of_all_machines_again(start, alone, tmp_path):
    first, second = start(1, restarts=3), start(2, restarts=3)
    first.wait_for("step 8/24")
    for pid in second.processes():
        if pid != second.agent.pid:
            os.kill(pid, signal.SIGKILL)
    end_well(first, second)
    assert "continuing from" in first.log
    assert largest_difference(alone, tmp_path / "output/run") == 0


@pytest.mark.slow
def test_a_machine_without_the_prepared_data_makes_it_from_the_same_files(start, alone, tmp_path):
    """And each keeps its own cache to the limit."""
    caches = [tmp_path / f"home-{number}/cache/luciole" for number in (1, 2)]
    for cache in caches:
        (old := cache / ("a" * 32)).mkdir(parents=True)
        (old / REPORT).touch()
    end_well(*(start(number, cache_dir=None, cache_size_limit=1e-9) for number in (1, 2)))
    assert largest_difference(alone, tmp_path / "output/run") == 0
    made = [[folder.name for folder in cache.glob("*[0-9a-f]")] for cache in caches]
    assert made[0] == made[1] != []
    assert len(made[0]) == 1, "what was rendered before was removed"


@pytest.mark.slow
@needs_root
def test_where_prepared_data_is_shared_one_machine_needs_the_files(start, alone, tmp_path):
    end_well(start(1), start(2, sees={tmp_path / "data": tmp_path / "empty"}))
    assert largest_difference(alone, tmp_path / "output/run") == 0


@pytest.mark.slow
@needs_root
def test_no_prepared_data_and_no_files_is_refused(start, tmp_path):
    machines = start(1, cache_dir=None), start(2, sees={tmp_path / "data": tmp_path / "empty"}, cache_dir=None)
    assert_refused(2, f"rank 1 on machine-2: the prepared data {tmp_path / 'home-2/cache/luciole'}", *machines)


@pytest.mark.slow
@needs_root
def test_no_prepared_data_and_other_files_is_refused(start, tmp_path):
    (tmp_path / "other").mkdir()
    write_rows(tmp_path / "other/train.jsonl", ROWS[:-1])
    machines = start(1, cache_dir=None), start(2, sees={tmp_path / "data": tmp_path / "other"}, cache_dir=None)
    assert_refused(2, "or the program is not what rank 0 made it with", *machines)


@pytest.mark.slow
@needs_root
def test_a_stream_needs_the_files_on_every_machine(start, tmp_path):
    machines = start(1, streaming=True), start(2, sees={tmp_path / "data": tmp_path / "empty"}, streaming=True)
    assert_refused(2, "rank 1 on machine-2: ", *machines)


@pytest.mark.slow
@needs_root
def test_other_weights_under_the_same_path_are_refused(start, checkpoint, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values()))[0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    text = "config.json of model_name_or_path: other contents on rank 1 on machine-2 than on rank 0 on machine-1"
    assert_refused(2, text, start(1), start(2, sees={checkpoint: other}))


@pytest.mark.slow
@needs_root
def test_a_model_that_is_not_there_is_refused(start, checkpoint, tmp_path):
    assert_refused(2, "rank 1 on machine-2: ", start(1), start(2, sees={checkpoint.parent: tmp_path}))


@pytest.mark.slow
def test_other_settings_are_refused(start):
    machines = start(1), start(2, learning_rate=1e-3)
    assert_refused(2, "learning_rate: 0.001 on rank 1 on ", *machines)


@pytest.mark.slow
@needs_root
def test_a_folder_that_cannot_be_written_ends_all_with_4(start, tmp_path):
    (tmp_path / "output").mkdir()
    machines = start(1), start(2, sees={tmp_path / "output": READ_ONLY})
    assert_refused(4, "rank 1 on machine-2: output_dir", *machines)
    assert not list((tmp_path / "output").iterdir())


@pytest.mark.slow
def test_another_number_of_processes_is_refused_unless_it_is_asked_for(start):
    settings = {"max_steps": 30, "resume_despite_changes": True}
    end_well(start(1), start(2))
    assert_refused(2, "number of processes: 2 then, 3 now", start(1, processes=2), start(2))
    first, second = start(1, processes=2, **settings), start(2, **settings)
    end_well(first, second)
    assert "going on from checkpoint-24 is not exact" in first.log


@pytest.fixture
def networks() -> Iterator[tuple[str, str]]:
    """Two network namespaces, joined by a cable whose ends have their names and the addresses 10.77.0.1 and .2."""
    names = f"lm{os.getpid()}a", f"lm{os.getpid()}b"
    for name in names:
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
    for number, name in enumerate(names, 1):
        ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", name)
        ip("-n", name, "link", "set", name, "up")
    yield names
    for name in names:
        ip("netns", "delete", name)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.mark.slow
@needs_ip
def test_two_machines_train_over_a_network_of_their_own(start, alone, networks, tmp_path):
    end_well(*(start(n, network=networks[n - 1], subnet="10.77.0") for n in (1, 2)))
    assert largest_difference(alone, tmp_path / "output/run") == 0


@pytest.mark.slow
@needs_ip
def test_a_network_that_falls_silent_ends_both_after_ddp_timeout(start, networks):
    """But not the torchrun whose rendezvous is on the other machine: it waits for that, which is its own affair."""
    settings = {"max_steps": 2000, "ddp_timeout": 20, "subnet": "10.77.0"}
    first, second = start(1, network=networks[0], **settings), start(2, network=networks[1], **settings)
    first.wait_for("step 8/2000")
    ip("-n", networks[1], "link", "set", networks[1], "down")
    assert 15 < end_by_themselves(first, seconds=100) < 60
    second.wait_for("rank 1 on machine-2 has lost another process of this run")
    assert "mistake of Luciole" not in first.log + second.log
    assert second.processes() == [second.agent.pid]


def check_command(words: list[str]) -> None:
    """See that torchrun and the program take a command of the page, and that its settings load."""
    assert words[0] == "torchrun"
    options = get_args_parser().parse_args(words[1:])
    assert (options.nnodes, options.nproc_per_node, options.rdzv_backend) == ("2", "8", "c10d")
    assert options.rdzv_endpoint.endswith(":29500") and options.rdzv_id
    assert options.training_script == "train_qlora.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [options.training_script, *options.training_script_args])
        patch.chdir(ROOT)
        cli = train_qlora.parse_command_line()
        _, training_args = load_arguments(cli.train_args_file, cli.overrides)
    assert training_args.output_dir == "/shared/output/chatglm3-6b"


def test_the_pages_command_for_slurm_is_what_torchrun_takes(tmp_path):
    """With programs in place of SLURM's, which print what they are given."""
    (script,) = blocks("sh")
    for name, body in (("scontrol", "printf 'node1\\nnode2\\n'"), ("srun", 'shift; printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}
    env["SLURM_JOB_NODELIST"] = "node[1-2]"
    done = subprocess.run(["bash", "-eu", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert "--rdzv_endpoint=node1:29500" in done.stdout
    check_command(done.stdout.splitlines())


def test_the_pages_job_for_kubernetes_is_what_torchrun_takes_and_its_names_fit():
    (text,) = blocks("yaml")
    service, job = yaml.safe_load_all(text)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_command(container["command"])
    name = job["metadata"]["name"]
    assert service["metadata"]["name"] == pod["subdomain"] == service["spec"]["selector"]["job-name"] == name
    assert f"--rdzv_endpoint={name}-0.{name}:29500" in container["command"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_pages_command_is_what_torchrun_takes():
    (line,) = blocks("bash")
    check_command(shlex.split(line))


def test_the_page_counts_bytes_and_milliseconds_as_they_are():
    page = (ROOT / "docs/several_machines.md").read_text()
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(ChatGLMConfig(padded_vocab_size=65024))
    weights = {}
    for rank in (64, 8):
        model = attach_lora(base, QLoRAArguments(model_name_or_path="x", train_file="x", lora_rank=rank))
        weights[rank] = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        base = model.unload()
        assert f"rank {rank} has {weights[rank]:,}" in page

    def row(*cells: str) -> None:
        assert f"| {' | '.join(cells)} |" in page

    def seconds(rank: int, processes: int, gigabits: int) -> float:
        return 2 * (processes - 1) / processes * 4 * weights[rank] / (gigabits * 1e9 / 8)

    for processes in (2, 4, 16):
        cells = []
        for rank in (64, 8):
            cells.append(f"{seconds(rank, processes, 8) * 1e3:.0f} MB")  # 8 Gb are 1 GB
            cells += [f"{seconds(rank, processes, speed) * 1e3:.0f} ms" for speed in (25, 100)]
        row(str(processes), *cells)
    for samples in (16, 64, 256):
        arithmetic = samples * 456 / 22751
        times = [seconds(rank, 16, speed) for rank in (64, 8) for speed in (25, 100)]
        shares = [f"{time / (time + arithmetic) * 100:.0f}%" for time in times]
        row(str(samples), f"{samples * 456:,}", f"{arithmetic * 1e3:,.0f} ms", *shares)
