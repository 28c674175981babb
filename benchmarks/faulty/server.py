"""A server of the demo, in a process of its own, that is asked, left and made to die.

In: flags. Out: answers and when they came, gauges, memory. Must never know what is a fault.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import httpx
from engines import Child, free_port, process_memory, reset_peak_memory

ROOT = Path(__file__).resolve().parents[2]
MORTAL = Path(__file__).with_name("mortal.py")
GENERATE = "/generate"
PATIENCE = 30.0  # seconds; what has not come by then is lost

Timed = tuple[float, httpx.Response]  # seconds until an answer was there


class MortalServer(Child):
    """A server that is ready; its engine dies at SIGUSR1."""

    def __init__(self, folder: Path, *flags: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        model = ("--model", str(ROOT / "models" / "demo"), "--port", str(port))
        super().__init__([sys.executable, "-P", MORTAL, *model, *flags], folder / "server.log")
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE, limits=httpx.Limits(max_connections=None))
        self.wait_until(lambda: bool(urlopen(f"{self.url}/ready").status == 200))

    def generate(self, num_tokens: int, streams: bool = False, prompt: str = "It was") -> Timed:
        body = {"prompt": prompt, "max_new_tokens": num_tokens, "ignore_eos": True, "stream": streams}
        return self.post(GENERATE, body)

    def post(self, path: str, body: Any) -> Timed:
        """Send JSON, or bytes that say that they are."""
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return timed(lambda: self.client.post(path, headers={"Content-Type": "application/json"}, **content))

    def generate_together(self, count: int) -> list[Timed]:
        """The answers to requests that are sent one right after the other, each on a connection of its own.

        By one thread without a client's library: where 80 threads of httpx share two processors with the server, it is
        them that take the time.
        """
        body = json.dumps({"prompt": "It was", "max_new_tokens": 1, "ignore_eos": True}).encode()
        address = urlsplit(self.url)
        head = (
            f"POST {GENERATE} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\nConnection: close"
        )
        request = f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        answers: list[Timed] = []
        with ExitStack() as stack:
            selector = stack.enter_context(selectors.DefaultSelector())
            addresses = [(address.hostname, address.port)] * count
            connections = [stack.enter_context(socket.create_connection(one, PATIENCE)) for one in addresses]
            for connection in connections:
                selector.register(connection, selectors.EVENT_READ, (connection, time.perf_counter(), bytearray()))
                connection.sendall(request)
            while len(answers) < count and (ready := selector.select(PATIENCE)):
                for connection, began, received in (key.data for key, _ in ready):
                    if piece := connection.recv(65536):
                        received += piece
                    else:
                        answers.append((time.perf_counter() - began, _parsed(bytes(received))))
                        selector.unregister(connection)
        return answers

    def leave(self, index: int) -> None:
        """A client that leaves: after some pieces of a stream, or some time before an answer in one piece.

        Half of the prompts are so long that some leave within them.
        """
        prompt = f"{index} " * (500 if index % 4 < 2 else 2)
        body = {"prompt": prompt, "max_new_tokens": 400, "ignore_eos": True, "stream": index % 2 == 0}
        timeout = httpx.Timeout(PATIENCE, read=PATIENCE if index % 2 == 0 else 0.02 * (1 + index % 5))
        with (
            suppress(httpx.ReadTimeout),
            httpx.stream("POST", self.url + GENERATE, json=body, timeout=timeout) as response,
        ):
            for _ in zip(range(index % 5), response.iter_raw(), strict=False):
                pass

    def gauge(self, *names: str) -> float:
        """The sum of some metrics without labels."""
        lines = (line.split() for line in self.client.get("/metrics").text.splitlines())
        return sum(float(line[1]) for line in lines if line[0] in {f"amalgam_{name}" for name in names})

    @property
    def num_requests(self) -> float:
        return self.gauge("requests_running", "requests_waiting")

    def seconds_until_status(self, path: str, status: int) -> float:
        return seconds_until(lambda: timed(lambda: self.client.get(path))[1].status_code == status)

    def start_peak(self) -> float:
        """Memory now, in MiB, from which on `peak` counts."""
        reset_peak_memory(self.process.pid)
        return process_memory(self.process.pid, "VmRSS") / 2**20

    def peak(self) -> float:
        return process_memory(self.process.pid, "VmHWM") / 2**20

    @contextmanager
    def asking_health(self) -> Iterator[list[Timed]]:
        """The answers of `/health`, asked again and again meanwhile."""
        answers: list[Timed] = []
        is_over = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=self.url, timeout=PATIENCE) as client:
                while not is_over.wait(0.01):
                    answers.append(timed(lambda: client.get("/health")))

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield answers
        finally:
            is_over.set()
            thread.join()


@contextmanager
def mortal_server(*flags: str) -> Iterator[MortalServer]:
    with TemporaryDirectory() as folder:
        server = MortalServer(Path(folder), *flags)
        try:
            yield server
        finally:
            server.close()


def _parsed(answer: bytes) -> httpx.Response:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    fields = [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
    return httpx.Response(int(first.split()[1]), headers=fields, content=body)


def timed(ask: Callable[[], httpx.Response]) -> Timed:
    """Status 599 stands for an answer that never came."""
    began = time.perf_counter()
    try:
        response = ask()
    except httpx.TransportError as error:
        response = httpx.Response(599, text=str(error))
    return time.perf_counter() - began, response


def seconds_until(condition: Callable[[], bool]) -> float:
    """How long it took; infinity if it takes longer than `PATIENCE`."""
    began = time.perf_counter()
    while not condition():
        if time.perf_counter() - began > PATIENCE:
            return float("inf")
        time.sleep(0.002)
    return time.perf_counter() - began
