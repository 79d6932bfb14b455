"""A Prometheus of our own on loopback: started for a test, asked over HTTP, always ended."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Self

from tests.programs import outside

RULES = Path(__file__).parents[2] / "deploy/prometheus/rules"
# The rules rate over a minute and are evaluated as often as samples come, so that a test sees them after a moment.
# A scrape may not take longer than the time to the next one, and on a loaded machine it takes its time.
CONFIGURATION = """
global: {{scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 200ms}}
rule_files: ["{rules}/*.yml"]
scrape_configs:
  - job_name: postcopy
    static_configs: [{{targets: {targets}}}]
"""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


class Prometheus:
    """Scrapes `targets` four times a second, with the rules that are shipped; its data goes to `folder`."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        configuration = folder / "prometheus.yml"
        configuration.write_text(CONFIGURATION.format(rules=RULES, targets=json.dumps(targets)))
        self._log = folder / "prometheus.log"
        self.url = f"http://127.0.0.1:{free_port()}"
        self._command = [
            outside("prometheus"),
            f"--config.file={configuration}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        try:
            self.until(self._ready, "ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def until(self, wanted: Any, what: str, deadline: float = 30) -> Any:
        """Look again and again until something is there, and return it."""
        end = time.monotonic() + deadline
        while not (found := wanted()):
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, f"not {what}: {self._log.read_text()}"
            time.sleep(0.02)  # between two looks, not to force an order
        return found

    def ask(self, way: str, **parameters: str) -> Any:
        """Ask the HTTP API and return its data; AssertionError with what it says of an expression that is wrong."""
        url = f"{self.url}/api/v1/{way}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                said = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error
        assert said["status"] == "success"
        return said["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return the samples of an expression now: labels and value."""
        data = self.ask("query", query=expression)
        return [(one["metric"], float(one["value"][1])) for one in data["result"]]

    def value(self, expression: str) -> float:
        """Return the value of an expression that has one sample, once nobody is late for its scrape."""
        samples: list[tuple[dict[str, str], float]] = self.until(
            lambda: len(found := self.query(expression)) == 1 and found, f"one sample of {expression}"
        )
        return samples[0][1]
