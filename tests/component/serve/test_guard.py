"""Who may ask, how much, and how long; and how a server ends."""

import json
import resource
import signal
import socket
import threading
import time
import weakref
from contextlib import suppress

import openai
import pytest

from component.run.errors import ArgumentError
from component.serve.guard import BODY_BYTES, is_loopback
from component.serve.server import EngineLost, allow_files, bind, find_key
from tests.component.serve.conftest import Running, Script, wait_until

BODY = {"model": "tuned", "messages": [{"role": "user", "content": "q"}]}
KEY = "a-key-of-many-characters"
ODD_HOSTS = [
    "u@localhost",
    "localhost/x",
    "localhost?x",
    "localhost#x",
    "localhost:x",
    "localhost:1:2",
    "::1",
    "local host",
]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1", "[::1]:99", "LOCALHOST:8000", "127.0.0.2:5"])
def test_hosts_of_loopback_are_answered_by_any_port(server, host):
    assert server.send("/health", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:80", "", "[", "localhost@evil.example", *ODD_HOSTS]
)
def test_other_hosts_are_refused(server, host):
    answer = server.send("/v1/models", headers={"Host": host})
    assert (answer.status, answer.json["error"]["type"]) == (403, "permission_error")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "file://", "http://["])
def test_pages_of_other_origins_are_refused(server, origin):
    for method, body in (("POST", BODY), ("OPTIONS", None), ("GET", None)):
        answer = server.send(body=body, headers={"Origin": origin}, method=method)
        assert (answer.status, answer.json["error"]["code"]) == (403, "origin_not_allowed")
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_a_path_cannot_forge_a_line_of_the_log(server, log):
    assert server.send("/%0a2026%20INFO%1b[31m").status == 404
    wait_until(lambda: any("GET /U+000A2026 INFOU+001B[31m 404" in line for line in log))


def test_an_odd_host_is_refused_also_where_any_is_taken(start):
    server = start(key=KEY, host="0.0.0.0")
    for host in ODD_HOSTS:
        assert server.send("/health", headers={"Host": host}).status == 403
    assert server.send("/health", headers={"Host": "any_name.example:80"}).status == 200


def test_of_several_origins_a_foreign_one_refuses(server):
    own, foreign = f"Origin: {server.url}\r\n", "Origin: https://evil.example\r\n"
    for origins, status in ((own + own, b"200"), (own + foreign, b"403"), (foreign + own, b"403")):
        connection = server.connect(f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n{origins}\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 " + status)
        connection.close()


def test_a_body_of_two_lengths_is_refused_and_its_connection_closed(server):
    connection = server.connect(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    )
    received = b""
    with suppress(ConnectionError):
        while part := connection.recv(1000):
            received += part
    assert received.startswith(b"HTTP/1.1 400") and received.count(b"HTTP/1.1") == 1
    assert b"not both" in received and b"connection: close" in received
    connection.close()


def test_the_own_page_may_ask(server, write):
    server.engine.answers = [write("\n a")]
    assert server.send(body=BODY, headers={"Origin": server.url}).status == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_form_of_another_page_can_send_is_refused(server, kind):
    answer = server.send(body=BODY, headers={"Content-Type": kind})
    assert (answer.status, answer.json["error"]["message"]) == (415, "the Content-Type must be application/json")


def test_a_key_is_needed_but_for_health_and_page(start, write):
    server = start(key=KEY, host="0.0.0.0")
    server.engine.answers = [write("\n a")]
    assert server.chat().choices[0].message.content == "a"
    for given in (None, "Bearer wrong", f"Basic {KEY}", KEY, "Bearer schl\xfcssel", f"Bearer {KEY}x", "Bearer "):
        headers = {"Host": "any.example"} | ({"Authorization": given} if given else {})
        for path, body in (("/v1/models", None), ("/v1/chat/completions", BODY), ("/v1/other", None)):
            answer = server.send(path, body, headers)
            assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json["error"]["code"] == "invalid_api_key"
    assert server.send("/health", headers={"Host": "any.example"}).status == 200
    assert server.send("/v1/models", headers={"Authorization": f"bearer {KEY}"}).status == 200
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="wrong").models.list()


def test_a_host_that_others_reach_needs_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("LUCIOLE_API_KEY", raising=False)
    assert find_key(None, "127.0.0.1") == find_key(None, "localhost") == find_key(None, "::1") == ""
    for host in ("0.0.0.0", "::", "", "192.168.1.5", "example.org"):
        with pytest.raises(ArgumentError, match="LUCIOLE_API_KEY is not set, and other machines reach --host"):
            find_key(None, host)
    monkeypatch.setenv("LUCIOLE_API_KEY", KEY)
    assert find_key(None, "0.0.0.0") == KEY
    file = tmp_path / "key"
    for text, fault in (
        ("", "is empty"),
        ("short", "16 characters or more"),
        ("two words " * 4, "one word"),
        ("schlüssel" * 4, "printable ASCII"),
        (f"{KEY}\x7f{KEY}", "printable ASCII"),
    ):
        file.write_text(text)
        with pytest.raises(ArgumentError, match=fault):
            find_key(str(file), "127.0.0.1")
    file.write_text(f"{KEY}2\n")
    assert find_key(str(file), "0.0.0.0") == f"{KEY}2"
    file.write_text(f"{KEY}3\n", encoding="utf-8-sig")  # as Windows writes
    assert find_key(str(file), "0.0.0.0") == f"{KEY}3"
    with pytest.raises(ArgumentError, match="cannot be read"):
        find_key(str(tmp_path / "none"), "127.0.0.1")


def test_is_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LocalHost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "10.0.0.1", "localhost.evil.example", "127.0.0.1.x")))


def test_a_body_that_is_too_large_is_refused(server):
    answer = server.send(body=b'{"model": "' + b"x" * BODY_BYTES + b'"}')
    assert (answer.status, answer.json["error"]["message"]) == (413, "the body has more than 4 MiB; send less")
    connection = server.connect(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100000000\r\n\r\n"
    )
    assert connection.recv(100).startswith(b"HTTP/1.1 413")
    connection.close()
    chunked = server.connect(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    for _ in range(5):
        chunked.sendall(chunk)
    assert chunked.recv(100).startswith(b"HTTP/1.1 413")
    chunked.close()


def test_few_large_bodies_are_read_at_once(server, write, monkeypatch):
    monkeypatch.setattr("component.serve.guard.LARGE_BODIES", 1)
    server.engine.answers = [write("\n a")]
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    large = BODY | {"user": "a" * 2**16}
    for begin in (b"Content-Length: 100000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n10001\r\n" + b" " * 0x10001):
        held = server.connect(head + begin)
        wait_until(lambda: server.send(body=large).status == 429)
        refused = server.send(body=large)
        assert "at most 1 large bodies" in refused.json["error"]["message"] and refused.headers["retry-after"] == "2"
        assert server.send(body=BODY).status == 200
        held.close()
        wait_until(lambda: server.send(body=large).status == 200)


def unread(server, **fields) -> socket.socket:
    """A connection of which nothing is read, and whose buffers are small."""
    server.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    data = json.dumps(BODY | fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
    return connection


def test_an_answer_that_has_ended_gives_its_place_back_though_nobody_reads_it(start, write):
    server = start()
    server.engine.answers = [write("\n " + "word " * 100)]
    connection = unread(server, stream=True)
    wait_until(lambda: server.engine.asked and server.engine.asked[0].finish_reason == "stop")
    wait_until(lambda: server.service.active == 0)
    assert server.server.server_state.tasks
    connection.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_given_up(start, write, monkeypatch, stream):
    monkeypatch.setattr("component.serve.server.SEND_SECONDS", 0.2)
    server = start()
    server.engine.answers, server.engine.pause = [write("\n " + "word " * 100)], 0.01 * stream
    connection = unread(server, stream=stream, logprobs=True, n=4)
    wait_until(lambda: server.engine.asked)
    wait_until(lambda: not server.server.server_state.connections)
    wait_until(lambda: bool(server.engine.cancelled) == stream)
    wait_until(lambda: server.service.active == 0)
    connection.close()


def test_a_client_that_reads_slowly_gets_everything(start, write, monkeypatch):
    monkeypatch.setattr("component.serve.server.SEND_SECONDS", 0.6)
    server = start()
    server.engine.answers = [write("\n " + "word " * 400)]
    connection, received = unread(server, stream=True), b""
    connection.settimeout(5)
    while not received.endswith(b"0\r\n\r\n"):
        time.sleep(0.01)
        part = connection.recv(1000)
        assert part
        received += part
    assert b"data: [DONE]" in received
    connection.close()


def test_what_follows_of_a_refused_body_is_not_waited_for(start, monkeypatch):
    monkeypatch.setattr("component.serve.server.HEADER_SECONDS", 0.3)
    server = start()
    head = b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 1000\r\n\r\n"
    connection = server.connect(head)
    connection.sendall(b"a")
    received = b""
    while part := connection.recv(1000):
        received += part
        with suppress(OSError):
            connection.sendall(b"a")
    assert received.startswith(b"HTTP/1.1 415") and received.endswith(b"}")
    connection.close()


def test_slow_headers_and_bodies_are_not_waited_for(start, monkeypatch):
    monkeypatch.setattr("component.serve.server.HEADER_SECONDS", 0.2)
    monkeypatch.setattr("component.serve.guard.BODY_SECONDS", 0.2)
    server = start()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for sent in (b"", head):
        connection = server.connect(sent)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408") and connection.recv(1) == b""
        connection.close()
    slow = server.connect(head + b"Content-Length: 20\r\n\r\n{")
    assert slow.recv(1000).startswith(b"HTTP/1.1 408")
    slow.close()
    question = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    kept = server.connect(b"")
    for _ in range(2):  # a connection may rest between two requests
        kept.sendall(question)
        answer = b""
        while not answer.endswith(b"}"):
            part = kept.recv(1000)
            assert part
            answer += part
        assert answer.startswith(b"HTTP/1.1 200")
        time.sleep(0.25)
    kept.sendall(b"GET /hea")
    assert kept.recv(1000).startswith(b"HTTP/1.1 408")
    kept.close()


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/v1/completions", "POST", 404),
        ("/v1/chat/completions", "GET", 405),
        ("/x", "GET", 404),
        ("/health/", "GET", 404),
    ],
)
def test_unknown_routes_are_told_in_openais_shape(server, path, method, status):
    answer = server.send(path, BODY if method == "POST" else None)
    assert answer.status == status
    assert f"there is no {method} {path} here" in answer.json["error"]["message"]


def test_sigterm_lets_answers_end_and_takes_no_new_ones(start, write):
    server = start()
    server.engine.answers, server.engine.pause = [write("\n Hello, world!")], 0.02
    stream = server.chat(stream=True)
    next(iter(stream))
    server.stop(signal.SIGTERM)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == "Hello, world!"
    server.thread.join(5)
    assert not server.thread.is_alive() and server.failure is None
    with pytest.raises(OSError):
        server.connect(b"")


@pytest.mark.parametrize(("signum", "drain"), [(signal.SIGTERM, 0.2), (signal.SIGINT, 60)])
def test_answers_that_do_not_end_in_time_are_cut_with_an_error(start, write, monkeypatch, signum, drain):
    monkeypatch.setattr("component.serve.server.DRAIN_SECONDS", drain)
    server = start()
    server.engine.answers, server.engine.pause = [write("\n " + "word " * 900)], 0.01
    stream = server.chat(stream=True)
    next(iter(stream))
    began = time.monotonic()
    server.stop(signum)
    with pytest.raises(openai.APIError, match="the server is ending"):
        list(stream)
    server.thread.join(5)
    assert not server.thread.is_alive() and time.monotonic() - began < 3
    assert server.engine.cancelled


def test_connections_that_wait_for_something_do_not_hold_the_end(start, monkeypatch):
    monkeypatch.setattr("component.serve.server.DRAIN_SECONDS", 0.2)
    server = start()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    held = [server.connect(part) for part in (b"", head, head + b"Content-Length: 20\r\n\r\n{")]
    wait_until(lambda: len(server.server.server_state.tasks) == 1)
    began = time.monotonic()
    server.stop(signal.SIGTERM)
    server.thread.join(5)
    assert not server.thread.is_alive() and time.monotonic() - began < 3
    for connection in held:
        connection.close()


def test_requests_that_are_being_read_do_not_hold_the_end(start, monkeypatch, caplog):
    monkeypatch.setattr("component.serve.server.DRAIN_SECONDS", 0.2)
    server, read = start(), threading.Event()
    monkeypatch.setattr(server.service, "read", lambda body: read.wait(20))
    held = [server.post(BODY), server.post(BODY)]
    wait_until(lambda: server.service.active == 2)
    began = time.monotonic()
    server.stop(signal.SIGTERM)
    server.thread.join(5)
    assert not server.thread.is_alive() and time.monotonic() - began < 3
    assert server.service.reader.is_alive() and server.service.reader.daemon
    assert not caplog.records
    read.set()
    for connection in held:
        connection.close()


def test_as_many_files_as_the_system_allows_may_be_open():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        allow_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_server_whose_engine_is_lost_ends(start, write, monkeypatch, log):
    server = start()
    server.engine.answers, server.engine.fault = [write("\n a")], RuntimeError("the card is lost")
    monkeypatch.setattr(server.service.worker, "make_engine", lambda: 1 / 0)
    with pytest.raises(openai.InternalServerError):
        server.chat()
    server.thread.join(5)
    assert isinstance(server.failure, EngineLost) and server.failure.exit_code == 1
    assert "the engine cannot be made anew: ZeroDivisionError" in "".join(log)


def test_the_engine_that_failed_is_gone_before_another_is_made(scripted_session, write):
    server = Running(scripted_session, Script)
    worker, held = server.service.worker, []
    worker.engine.fault = RuntimeError("CUDA out of memory")
    first = weakref.ref(worker.engine)
    worker.make_engine = lambda: held.append(first()) or Script()
    with pytest.raises(openai.InternalServerError):
        server.chat()
    assert server.chat().choices[0].finish_reason == "stop"
    server.close()
    assert held == [None]


def test_nothing_is_left_behind(scripted_session):
    before = set(threading.enumerate())
    server = Running(scripted_session, Script)
    server.chat()
    assert {thread.name for thread in set(threading.enumerate()) - before} >= {"engine", "prompts"}
    server.close()
    wait_until(lambda: set(threading.enumerate()) <= before)
    with pytest.raises(OSError):
        server.connect(b"")


def test_a_port_is_taken_before_anything_is_loaded():
    taken = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(ArgumentError, match=f"--port {port}: cannot listen there .*; give another --port"):
        bind("127.0.0.1", port)
    taken.close()
    bind("127.0.0.1", port).close()
    with pytest.raises(ArgumentError, match="--port 70000: give one of 1 to 65535"):
        bind("127.0.0.1", 70000)
    for host, number in (("no.such.host.invalid", 8000), ("192.0.2.1", 0)):
        with pytest.raises(ArgumentError, match="cannot listen there"):
            bind(host, number)


def test_health_is_told_while_many_are_answered(server, write):
    server.engine.answers, server.engine.pause = [write("\n " + "word " * 200)], 0.002
    held = [server.post(BODY | {"stream": True}) for _ in range(30)]
    wait_until(lambda: server.service.active == 30)
    times = []
    for _ in range(50):
        began = time.monotonic()
        assert server.send("/health").status == 200
        times.append(time.monotonic() - began)
    for connection in held:
        connection.close()
    assert sorted(times)[-3] < 0.3
