"""script/serve.py: what it refuses before it loads anything, what it prints, and how it ends."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest

from component.inference.session import Session
from component.serve.names import fingerprints, model_ids
from script import serve

ROOT = Path(__file__).parents[2]
BODY = {"model": "run", "messages": [{"role": "user", "content": "q"}]}


@pytest.fixture
def base(model_folder) -> Path:
    return model_folder()


@pytest.fixture
def adapter(base, adapter_folder, tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return Path(shutil.move(adapter_folder(base), tmp_path / "run/final"))


@pytest.fixture
def refused(monkeypatch, capfd):
    """Runs the command, which must end before it loads weights; returns the lines that it wrote."""

    def run(*arguments) -> list[str]:
        capfd.readouterr()
        monkeypatch.setattr(Session, "load", None)
        monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            serve.main()
        assert stop.value.code == 2
        return capfd.readouterr().err.splitlines()

    return run


def test_a_port_that_is_taken_is_told_first(refused, adapter):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (line,) = refused("--adapter", adapter, "--port", port)
    assert f"--host 127.0.0.1 --port {port}: cannot listen there" in line and "give another --port" in line


def test_a_host_that_others_reach_needs_a_key(refused, adapter, monkeypatch):
    monkeypatch.delenv("LUCIOLE_API_KEY", raising=False)
    (line,) = refused("--adapter", adapter, "--host", "0.0.0.0")
    assert "LUCIOLE_API_KEY is not set, and other machines reach --host 0.0.0.0" in line and "--api_key_file" in line


def test_another_base_and_a_damaged_adapter_are_refused(refused, adapter, base, tmp_path):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_layers": 1}))
    assert "other" in refused("--adapter", adapter, "--base", other, "--port", 0)[-1]
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "adapter_model.safetensors" in refused("--adapter", adapter, "--port", 0)[-1]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ([], "give either --adapter or --model"),
        (["--adapter", "a", "--model", "m"], "give either --adapter or --model"),
        (["--model", "m", "--base", "b"], "--base needs --adapter"),
        (["--model", "m", "--max_batch", "0"], "0 is not positive"),
        (["--model", "none/such", "--port", "70000"], "--port 70000: give one of 1 to 65535"),
    ],
)
def test_a_wrong_command_line_is_refused(refused, arguments, fault):
    assert fault in refused(*arguments)[-1]


def test_the_tuned_model_is_called_as_its_run_and_the_base_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/tiny", "output/x/final", "output/x/checkpoint-9", "output/tiny/final", "adapters/mine"):
        Path(folder).mkdir(parents=True)
    base = "models/tiny"
    assert model_ids(base, "output/x/final/") == {"x": True, "tiny": False}
    assert model_ids(base, "output/x/checkpoint-9") == {"x-checkpoint-9": True, "tiny": False}
    assert model_ids(base, "output/tiny/final") == {"tiny": True, "tiny-base": False}
    assert model_ids(base, "someone/Tiny") == {"someone/Tiny": True, "tiny": False}
    assert model_ids("Org/Name", "org/name") == {"org/name": True, "Org/Name-base": False}
    assert model_ids(base, "adapters/mine") == {"mine": True, "tiny": False}
    assert model_ids("org/name", "someone/adapter") == {"someone/adapter": True, "org/name": False}
    assert model_ids(base, None) == {"tiny": False}
    monkeypatch.chdir("output/x/final")
    assert list(model_ids(tmp_path / base, ".")) == ["x", "tiny"]


def test_fingerprints_tell_adapters_and_bits_apart(base, adapter):
    models = {"run": True, "base": False}
    session = Session.prepare(str(base), adapter)
    marks = fingerprints(session, models)
    assert len(set(marks.values())) == 2 and marks == fingerprints(session, models)
    session.base_bits = 4
    assert not set(fingerprints(session, models).values()) & set(marks.values())


class Command:
    """The real command, which listens."""

    def __init__(self, folder: Path, *arguments, **variables):
        self.out, self.err = folder / "out", folder / "err"
        command = [sys.executable, "script/serve.py", *map(str, arguments), "--port", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)
        while not self.out.read_text().endswith("\n"):
            assert self.process.poll() is None, self.err.read_text()
            time.sleep(0.05)
        self.port = int(self.out.read_text().split(":")[2].split("/")[0])

    def ask(self, **fields):
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"Content-Type": "application/json", "Authorization": "Bearer " + "k" * 20}
        connection.request("POST", "/v1/chat/completions", json.dumps(BODY | fields), headers)
        return connection.getresponse()

    def end(self, *signals) -> tuple[int, str, str]:
        for signum in signals:
            self.process.send_signal(signum)
            time.sleep(0.3)
        return self.process.wait(20), self.out.read_text(), self.err.read_text()


def test_the_command_says_how_to_ask_answers_and_ends_by_sigterm(adapter, tmp_path):
    command = Command(
        tmp_path, "--adapter", adapter, "--host", "0.0.0.0", "--max_tokens", "64", LUCIOLE_API_KEY="k" * 20
    )
    assert json.loads(command.ask(max_tokens=4).read())["usage"]["completion_tokens"] <= 4
    streamed = command.ask(stream=True)
    code, out, err = command.end(signal.SIGTERM)
    assert streamed.read().endswith(b"data: [DONE]\n\n")
    assert code == 143 and err.endswith("SIGTERM: the server has ended\n")
    assert out.startswith(f"listening at http://0.0.0.0:{command.port}/v1\n")
    assert "model run; its base is chatglm3-nano" in out and "Authorization: Bearer $LUCIOLE_API_KEY" in out
    assert "every request to /v1 needs the key" in out
    assert "POST /v1/chat/completions 200 run" in err
    assert "k" * 20 not in out + err and "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_ends_at_once(adapter, tmp_path):
    command = Command(tmp_path, "--adapter", adapter)
    streamed = command.ask(stream=True)
    streamed.read(10)
    code, _, err = command.end(signal.SIGINT)
    assert code == 130 and err.endswith("SIGINT: the server has ended\n") and "Traceback" not in err


@pytest.mark.slow
def test_a_second_signal_ends_at_once(adapter, tmp_path):
    command = Command(tmp_path, "--adapter", adapter)
    held = socket.create_connection(("127.0.0.1", command.port))
    body = json.dumps(BODY | {"n": 16}).encode()
    held.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    held.sendall(f"Content-Length: {len(body) + 1}\r\n\r\n".encode() + body)  # a byte is missing
    began = time.monotonic()
    code, _, err = command.end(signal.SIGTERM, signal.SIGTERM)
    assert code == 143 and time.monotonic() - began < 5 and "Traceback" not in err
    held.close()
