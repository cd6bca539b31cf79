"""A Jobs API that does what a test has written down: on loopback, in a thread."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ray

Happens = Callable[["JobsServer"], None]


class Job:
    """A job that goes from state to state, one for each time that somebody asks; in the last one it stays."""

    def __init__(self, *states: str, message: str = "", exit_code: int | None = None, logs: str = "") -> None:
        self.states, self.message, self.exit_code, self.logs = deque(states), message, exit_code, logs
        self.metadata: dict[str, str] = {}
        self.entrypoint = ""

    def told(self, job: str, ask: bool = True) -> dict[str, Any]:
        state = self.states.popleft() if ask and len(self.states) > 1 else self.states[0]
        ended = state in ("SUCCEEDED", "FAILED", "STOPPED")
        return {
            "type": "SUBMISSION", "submission_id": job, "status": state, "entrypoint": self.entrypoint,
            "message": self.message, "metadata": self.metadata, "driver_exit_code": self.exit_code if ended else None,
        }  # fmt: skip


class JobsServer:
    """The server. A context manager.

    Attributes:
        jobs: By id.
        next: Of the next jobs that are submitted: the states that they go through.
        troubles: What happens to requests to come before they are answered: a status, "drop" or "html"; None answers.
        asked: Methods and paths of all requests.
    """

    def __init__(self) -> None:
        self.version = ray.__version__
        self.jobs: dict[str, Job] = {}
        self.next: deque[Job] = deque()
        self.troubles: deque[int | str | None] = deque()
        self.asked: list[tuple[str, str]] = []
        self.submitted: list[dict[str, Any]] = []
        self.stopped: list[str] = []
        # A request for a job, and what happens right before its answer.
        self.before_submit: Happens | None = None
        # Why the next jobs cannot be started yet.
        self.starting: deque[str] = deque()
        self.packages: dict[str, bytes] = {}
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                owner._answer(self, body)

            do_GET = do_POST = do_PUT = do_DELETE = _any

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> JobsServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        method, path = handler.command, handler.path.partition("?")[0]
        self.asked.append((method, path))
        trouble = self.troubles.popleft() if self.troubles else None
        if trouble == "drop":
            handler.close_connection = True
            return
        if trouble == "html":
            return self._send(handler, 200, b"<html>not Ray</html>", "text/html")
        if isinstance(trouble, int):
            return self._send(handler, trouble, b"the script says so")
        status, made = self._do(method, path, body)
        if isinstance(made, bytes):
            return self._send(handler, status, made)
        self._send(handler, status, json.dumps(made).encode(), "application/json")

    def _do(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        if path == "/api/version":
            return 200, {"version": "4", "ray_version": self.version, "ray_commit": "x", "session_name": "s"}
        if parts[:2] == ["api", "packages"]:
            if method == "PUT":
                self.packages["/".join(parts[2:])] = body
            return (200, {}) if "/".join(parts[2:]) in self.packages else (404, b"no such package")
        if parts[:2] != ["api", "jobs"]:
            return 404, b"nothing here"
        if len(parts) == 2:
            return self._submit(json.loads(body)) if method == "POST" else (
                200, [job.told(name, ask=False) for name, job in self.jobs.items()],
            )  # fmt: skip
        job = self.jobs.get(parts[2])
        if job is None:
            return 404, f"Job {parts[2]} does not exist".encode()
        if parts[3:] == ["logs"]:
            return 200, {"logs": job.logs}
        if parts[3:] == ["stop"]:
            self.stopped.append(parts[2])
            running = job.states[0] in ("PENDING", "RUNNING")
            job.states = deque(["STOPPED"]) if running else job.states
            return 200, {"stopped": running}
        return 200, job.told(parts[2])

    def _submit(self, asked: dict[str, Any]) -> tuple[int, Any]:
        if self.starting:
            return 500, self.starting.popleft().encode()
        if self.before_submit is not None:
            self.before_submit(self)
        name = asked["submission_id"]
        if name in self.jobs:
            return 500, f"Job with submission_id {name} already exists. Please use a different one.".encode()
        self.submitted.append(asked)
        self.jobs[name] = self.next.popleft() if self.next else Job("RUNNING", "SUCCEEDED")
        self.jobs[name].metadata, self.jobs[name].entrypoint = asked["metadata"], asked["entrypoint"]
        return 200, {"job_id": name, "submission_id": name}

    def _send(self, handler: BaseHTTPRequestHandler, status: int, body: bytes, kind: str = "text/plain") -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
