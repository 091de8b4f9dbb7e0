"""The API as a program sees it: a real agent, a real unix socket, a fake engine behind it."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.agents import Device, UnixConnection, running, serving
from tests.fakes.fake_model import install

pytestmark = pytest.mark.swarm

with socket.create_server(("127.0.0.1", 0)) as free:
    TCP_PORT = free.getsockname()[1]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    folder = tmp_path_factory.mktemp("api")
    install(folder / "store")
    one = Device(folder / "one", folder / "store", api={"tcp_port": TCP_PORT})
    with running(one):
        one.wait(serving)
        yield one


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} | fields


def events(device: Device, body: dict[str, Any], target: str = "/v1/chat/completions") -> list[Any]:
    with contextlib.closing(UnixConnection(device.socket)) as connection:
        connection.request("POST", target, json.dumps(body | {"stream": True}))
        response = connection.getresponse()
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.read().split(b"\n\n") if line]
    assert all(line.startswith(b"data: ") for line in lines)
    found = [line.removeprefix(b"data: ") for line in lines]
    return [json.loads(line) if line.startswith(b"{") else line for line in found]


def engine_requests(device: Device, count: int, cancelled: int) -> None:
    """Wait until the engine runs `count` requests and has seen at least `cancelled` cancels."""

    def wanted(status: dict[str, Any]) -> bool:
        stats = status["engine"]["stats"]
        return stats["requests"] == count and stats["cancelled"] >= cancelled

    device.wait(wanted, 10)


def cancelled_so_far(device: Device) -> int:
    status = device.status()
    assert status
    return int(status["engine"]["stats"]["cancelled"])


def test_models_are_listed_and_looked_up(device: Device) -> None:
    status, models = device.request("GET", "/v1/models")
    assert (status, [model["id"] for model in models["data"]]) == (200, ["tiny"])
    assert device.request("GET", "/v1/models/tiny")[1]["object"] == "model"
    status, answer = device.request("GET", "/v1/models/gpt-5")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_a_chat_is_answered(device: Device) -> None:
    status, answer = device.request("POST", "/v1/chat/completions", chat("hello world"))
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == "you said: hello world "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 4


def test_a_text_is_continued_up_to_max_tokens(device: Device) -> None:
    body = {"prompt": "a b c d", "max_tokens": 2, "model": "tiny"}
    status, answer = device.request("POST", "/v1/completions", body)
    assert (status, answer["choices"][0]["text"]) == (200, "you said: ")
    assert answer["choices"][0]["finish_reason"] == "length"


def test_sampling_reaches_the_engine(device: Device) -> None:
    body = chat("echo", temperature=0.25, top_p=0.5, top_k=7, seed=3, stop=["x"], max_tokens=9)
    _, answer = device.request("POST", "/v1/chat/completions", body)
    order = json.loads(answer["choices"][0]["message"]["content"])
    assert [order[name] for name in ("temperature", "top_p", "top_k", "seed", "stop")] == [
        0.25,
        0.5,
        7,
        3,
        ["x"],
    ]


def test_a_streamed_chat_is_what_openai_clients_expect(device: Device) -> None:
    first, *middle, last, usage, end = events(
        device, chat("hello world", stream_options={"include_usage": True})
    )
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle)
    assert text == "you said: hello world "
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 11)
    assert end == b"[DONE]"
    assert len({chunk["id"] for chunk in (first, *middle, last, usage)}) == 1


def test_a_streamed_text_ends_with_done(device: Device) -> None:
    *chunks, end = events(device, {"prompt": "x y"}, "/v1/completions")
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "you said: x y "
    assert end == b"[DONE]"


def test_an_error_before_the_first_token_is_an_http_error_streamed_or_not(device: Device) -> None:
    for stream in (False, True):
        body = chat("uncovered", stream=stream)
        status, answer = device.request("POST", "/v1/chat/completions", body)
        assert (status, answer["error"]["missing_bytes"]) == (503, 12345)
        status, answer = device.request("POST", "/v1/chat/completions", chat("toolong"))
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_an_error_in_the_middle_of_a_stream_is_said_and_no_finish_is_faked(device: Device) -> None:
    *chunks, error = events(device, chat("fail"))
    assert error["error"]["message"] == "It broke half way."
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


def test_a_client_that_leaves_a_stream_ends_its_request(device: Device) -> None:
    before = cancelled_so_far(device)
    connection = UnixConnection(device.socket)
    connection.request("POST", "/v1/chat/completions", json.dumps(chat("forever", stream=True)))
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    response.close()
    connection.close()
    engine_requests(device, 0, before + 1)


def test_a_client_that_leaves_before_a_whole_answer_ends_its_request(device: Device) -> None:
    before = cancelled_so_far(device)
    connection = UnixConnection(device.socket)
    connection.request("POST", "/v1/chat/completions", json.dumps(chat("forever")))
    engine_requests(device, 1, before)
    connection.close()
    engine_requests(device, 0, before + 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_ends_its_request(
    device: Device, stream: bool
) -> None:
    before = cancelled_so_far(device)
    connection = UnixConnection(device.socket)
    body = json.dumps(chat("silent", stream=stream))
    connection.request("POST", "/v1/chat/completions", body)
    engine_requests(device, 1, before)
    connection.close()
    engine_requests(device, 0, before + 1)


def test_a_client_that_stops_reading_is_cut_off(device: Device) -> None:
    before = cancelled_so_far(device)
    with contextlib.closing(UnixConnection(device.socket)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(chat("forever", stream=True)))
        engine_requests(device, 0, before + 1)


def test_a_client_that_breaks_its_upload_off_is_no_bug(device: Device) -> None:
    before = device.wait(serving)["api"].get("abandoned", 0)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(device.socket))
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    device.wait(lambda status: status["api"].get("abandoned", 0) > before)
    assert "Traceback" not in device.log


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"\xff" * 100, 400, None),
        (json.dumps(chat("x", max_tokens=-1)).encode(), 400, "max_tokens"),
        (json.dumps(chat("x", model="gpt-5")).encode(), 404, "model"),
        (b" " * (9 << 20), 413, None),
    ],
)
def test_a_bad_body_is_refused(device: Device, body: bytes, status: int, param: str) -> None:
    found, answer = device.request("POST", "/v1/chat/completions", body)
    assert (found, answer["error"]["param"]) == (status, param)
    assert answer["error"]["type"] == "invalid_request_error"


def test_an_unknown_path_and_a_wrong_method_are_errors_in_openais_form(device: Device) -> None:
    for method, target, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405)):
        found, answer = device.request(method, target)
        assert (found, "message" in answer["error"]) == (status, True)


def test_bytes_that_are_no_http_harm_nobody(device: Device) -> None:
    for data in (b"\0" * 1000, b"GET / HTTP/9.9\r\n\r\n", os.urandom(5000), b"POST"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(device.socket))
            sock.sendall(data)
    assert device.request("GET", "/healthz")[1] == {"ok": True, "model": True}


def test_an_engine_that_dies_fails_its_answers_and_comes_back(device: Device) -> None:
    before = device.wait(serving)["engine"]
    status, answer = device.request("POST", "/v1/chat/completions", chat("crash"))
    assert (status, answer["error"]["code"]) == (503, "engine_gone")
    after = device.wait(lambda status: serving(status) and status["engine"]["pid"] != before["pid"])
    assert after["engine"]["restarts"] == before["restarts"] + 1


def test_an_engine_that_babbles_is_replaced(device: Device) -> None:
    before = device.wait(serving)["engine"]
    status, answer = device.request("POST", "/v1/chat/completions", chat("babble"))
    assert (status, answer["error"]["code"]) == (503, "engine_gone")
    device.wait(lambda status: serving(status) and status["engine"]["pid"] != before["pid"])


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:80", 200), ("127.0.0.1", 200), ("evil.example", 403), ("", 403)],
)
def test_the_tcp_port_answers_only_to_local_names(device: Device, host: str, status: int) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", TCP_PORT, 20)) as connection:
        connection.request("GET", "/v1/models", headers={"Host": host})
        assert connection.getresponse().status == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("http://127.0.0.1", 200),
        ("http://evil.example", 403),
        ("http://localhost.evil.example:80", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_the_tcp_port_answers_only_to_pages_of_this_machine(
    device: Device, origin: str, status: int
) -> None:
    headers = {"Origin": origin, "Content-Type": "text/plain"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", TCP_PORT, 20)) as connection:
        connection.request("POST", "/v1/completions", '{"prompt": "hi"}', headers)
        assert connection.getresponse().status == status


def test_the_socket_is_not_for_everybody(device: Device) -> None:
    assert stat.S_IMODE(device.socket.stat().st_mode) == 0o660


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_works(device: Device) -> None:
    command = ["curl", "-sN", "--unix-socket", str(device.socket), "http://x/v1/completions"]
    body = '{"prompt": "from curl", "stream": true}'
    done = subprocess.run([*command, "-d", body], capture_output=True, timeout=20, check=True)
    assert done.stdout.endswith(b"data: [DONE]\n\n")


def coeld(device: Device, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coeld", *words, "--socket", str(device.socket)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=30, check=False
    )


def test_coeld_ask_prints_the_answer_and_explains_errors(device: Device) -> None:
    done = coeld(device, "ask", "hello there", "--stats")
    assert (done.returncode, done.stdout) == (0, "you said: hello there \n")
    assert "4 tokens, 1.5 tok/s, answered by 1 device" in done.stderr
    done = coeld(device, "ask", "-", "--raw", "--max-tokens", "3", stdin="one two")
    assert done.stdout == "you said: one \n"
    done = coeld(device, "ask", "uncovered", "--wait", "0")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "12345 bytes" in done.stderr


def test_coeld_ask_waits_for_a_swarm_that_organises_itself(tmp_path: Path) -> None:
    install(tmp_path / "store")
    one = Device(tmp_path / "one", tmp_path / "store")
    with running(one):
        one.wait(lambda _: True)  # it has a socket, its engine is starting
        done = coeld(one, "ask", "are you there?")
        assert (done.returncode, done.stdout) == (0, "you said: are you there? \n")
        done = coeld(one, "ask", "uncovered", "--wait", "1")
        assert (done.returncode, done.stdout) == (1, "")
        assert "waiting up to 1 s: " in done.stderr
        assert done.stderr.count("12345 bytes") == 2


def test_coeld_ask_does_not_wait_for_what_needs_a_person(tmp_path: Path) -> None:
    one = Device(tmp_path / "one", tmp_path / "store")
    with running(one):
        one.wait(lambda status: "coeld model add" in status["engine"]["trouble"])
        began = time.monotonic()
        done = coeld(one, "ask", "are you there?")
        assert (done.returncode, "coeld model add" in done.stderr) == (1, True)
        assert time.monotonic() - began < 5


def test_a_device_that_stops_says_so_in_the_answers_it_breaks_off(tmp_path: Path) -> None:
    install(tmp_path / "store")
    one = Device(tmp_path / "one", tmp_path / "store")
    with running(one):
        one.wait(serving)
        with contextlib.closing(UnixConnection(one.socket)) as connection:
            body = json.dumps(chat("slowly", stream=True))
            connection.request("POST", "/v1/chat/completions", body)
            response = connection.getresponse()
            assert response.readline().startswith(b"data: ")
            code, seconds = one.stop()
            *_, last = [line for line in response.read().split(b"\n\n") if line]
        assert "told to stop" in json.loads(last.removeprefix(b"data: "))["error"]["message"]
        assert (code, seconds < 2) == (0, True)


def test_ctrl_c_ends_coeld_ask_and_its_request(device: Device) -> None:
    before = cancelled_so_far(device)
    command = [sys.executable, "-m", "coeld", "ask", "slowly", "--socket", str(device.socket)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.read(4) == b"word"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
        assert (process.returncode, b"Traceback" in error) == (130, False)
    engine_requests(device, 0, before + 1)


def test_coeld_status_and_doctor_show_the_swarm(device: Device) -> None:
    assert json.loads(coeld(device, "status", "--json").stdout)["node"]["me"]
    assert "24 of 24 experts are served" in coeld(device, "status").stdout
    done = coeld(device, "doctor")
    assert (done.returncode, "ok swarm" in done.stdout) == (0, True)


def test_coeld_chat_remembers(device: Device) -> None:
    done = coeld(device, "chat", stdin="my name is Ada\necho\n")
    assert "my name is Ada" in done.stdout.split("> ")[-2]


def test_coeld_chat_forgets_the_oldest_turns_when_the_context_is_full(device: Device) -> None:
    words = ("chat", "--system", "be brief")
    done = coeld(device, *words, stdin="first\nsecond\nthird\nrecall\nrecall toolong\necho\n")
    answers = [line for line in done.stdout.split("> ") if line.startswith("{")]
    recalled, last = map(json.loads, answers)
    contents = [message["content"] for message in recalled["messages"]]
    assert contents == ["be brief", "third", "you said: third ", "recall"]
    assert "the oldest 4 messages are forgotten" in done.stderr
    assert "The prompt does not fit." in done.stderr  # alone neither
    assert [message["content"] for message in last["messages"]][:4] == contents


def test_ctrl_c_in_coeld_chat_keeps_the_question_and_what_was_answered(device: Device) -> None:
    command = [sys.executable, "-m", "coeld", "chat", "--socket", str(device.socket)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"my name is Ada, speak slowly\n")
        process.stdin.flush()
        assert process.stdout.read(6) == b"> word"
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(b"echo\n", timeout=20)
    assert (process.returncode, b"Traceback" in error) == (0, False)
    question, answer, _ = json.loads(out[out.index(b"{") : out.rindex(b"}") + 1])["messages"]
    assert question == {"role": "user", "content": "my name is Ada, speak slowly"}
    assert answer["role"] == "assistant"
    assert answer["content"].startswith("word ")


def test_coeld_ask_says_that_the_context_is_full_unless_it_asked_for_an_end(device: Device) -> None:
    done = coeld(device, "ask", "make it full")
    assert (done.returncode, done.stdout) == (0, "you said: make it full \n")
    assert "the context is full" in done.stderr
    assert "the context is full" in coeld(device, "ask", "full", "--max-tokens", "9").stderr
    assert coeld(device, "ask", "one two", "--max-tokens", "3").stderr == ""


def test_without_a_daemon_the_commands_say_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "coeld", "ask", "hi", "--socket", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, "coeld up" in done.stderr) == (1, True)
