"""The page of a study while it runs: served on this machine alone, asked again by the browser every few seconds."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import fmean
from typing import TYPE_CHECKING, Any, final

from learn2perturb.errors import ConfigError, Learn2PerturbError
from learn2perturb.progress import duration
from learn2perturb.report.content import contents
from learn2perturb.report.page import rendered
from learn2perturb.report.section import RunProgress
from learn2perturb.report.sources import Material, add_record
from learn2perturb.terminal import one_line

if TYPE_CHECKING:
    from learn2perturb.experiments.ledger import Ledger

HOST, PORT = "127.0.0.1", 8765
_NAMES = (HOST, "localhost")
_STATE, _PAGE = "/state", "/"


@final
@dataclass(frozen=True)
class Look:
    """What a study has at one moment: its page, the version of it, how far each run is, and what went wrong."""

    page: str
    version: str
    runs: tuple[RunProgress, ...]
    trouble: str = ""

    @property
    def state(self) -> dict[str, Any]:
        """What the browser asks for again and again."""
        return {"version": self.version, "runs": [asdict(run) for run in self.runs], "trouble": self.trouble}


@final
class Watch:
    """Looks at a study in a store, once for everybody who asks at the same time. Reads alone: a study may be at work.

    A page is made anew where a record or an epoch is new.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._lock = ledger, threading.Lock()
        self._last: Look | None = None

    def look(self) -> Look:
        """Return how it is now; what cannot be read is said beside what was read last."""
        with self._lock:
            try:
                self._last = self._looked()
            except Learn2PerturbError as error:
                if self._last is None:
                    raise
                self._last = Look(self._last.page, self._last.version, self._last.runs, one_line(error))
            return self._last

    def _looked(self) -> Look:
        from learn2perturb.experiments.folder import contents as contents_of
        from learn2perturb.experiments.views import build_views

        ledger = self._ledger
        results = ledger.results()
        runs = tuple(progress(ledger))
        there = [(str(answer.path), answer.record) for answer in results.answers if answer.record is not None]
        facts = json.dumps([sorted({path for path, _ in there}), [(run.run, run.epochs) for run in runs]])
        version = hashlib.sha256(facts.encode()).hexdigest()[:16]
        if self._last is not None and self._last.version == version:
            return Look(self._last.page, version, runs)
        found = Material(studies=[contents_of(results, (), ledger.store.folder)], views=build_views(results))
        for path, record in dict(there).items():
            add_record(path, record, found)
        return Look(rendered(contents(found, None), runs=runs, version=version), version, runs)


def progress(ledger: Ledger) -> Iterator[RunProgress]:
    """Yield how far each run of a study is, and about how long the rest takes by what was measured in it."""
    study = ledger.study
    histories = {run.title: ledger.history(run) for run in study.runs}
    epoch = [float(line["seconds"]) for lines in histories.values() for line in lines if "seconds" in line]
    cell = [
        float(event["seconds"])
        for event in ledger.store.events()
        if event.get("what") == "ended"
        and event.get("kind") == "cell"
        and isinstance(event.get("seconds"), int | float)
    ]
    for run in study.runs:
        pairs = list(study.pairs(run))
        done = sum(ledger.is_there(pair) for pair in pairs)
        trained = ledger.network(run) is not None
        epochs = len(histories[run.title])
        own = [float(line["seconds"]) for line in histories[run.title] if "seconds" in line] or epoch
        total = 0 if run.config is None else run.config.closed().epochs
        left = 0 if trained else max(0, total - epochs)
        known = (own or not left) and (cell or done == len(pairs))
        rest = (left * fmean(own) if left and own else 0.0) + ((len(pairs) - done) * fmean(cell) if cell else 0.0)
        finished = trained and done == len(pairs)
        told = "done" if finished else f"about {duration(rest)}" if known else "not known yet"
        yield RunProgress(run.title, total if trained else epochs, total, done, len(pairs), told)


@final
class _Server(ThreadingHTTPServer):
    """Serves one page to this machine; ``watch`` says what."""

    daemon_threads = True
    watch: Watch


@final
class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 30
    server_version, sys_version = "learn2perturb", ""

    def do_GET(self) -> None:
        # A page elsewhere that has its own name resolve to this machine must not read what is here.
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in _NAMES:
            return self._answer(HTTPStatus.FORBIDDEN, "text/plain", "asked by another name than 127.0.0.1\n")
        answers: dict[str, Callable[[Look], tuple[str, str]]] = {
            _PAGE: lambda look: ("text/html", look.page),
            _STATE: lambda look: ("application/json", json.dumps(look.state)),
        }
        answer = answers.get(self.path.partition("?")[0])
        if answer is None:
            return self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there is / and /state\n")
        try:
            kind, text = answer(self.server.watch.look())
        except Learn2PerturbError as error:
            return self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", one_line(error) + "\n")
        return self._answer(HTTPStatus.OK, kind, text)

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content)), "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: a line every three seconds would bury everything else."""


def server(ledger: Ledger, port: int = PORT) -> ThreadingHTTPServer:
    """Return a server of the page of a study, on this machine alone. Port 0: any free one.

    Raises:
        ConfigError: the port is taken.
    """
    watch = Watch(ledger)
    watch.look()  # what is wrong is said here, and not to a browser
    try:
        found = _Server((HOST, port), _Handler)
    except OSError as error:
        raise ConfigError(f"port {port} cannot be had: {error.strerror or error}; give another --port") from None
    found.watch = watch
    return found


def address(found: ThreadingHTTPServer) -> str:
    """Return where a browser finds the page."""
    return f"http://{HOST}:{found.server_address[1]}/"
