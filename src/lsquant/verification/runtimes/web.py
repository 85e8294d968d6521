"""onnxruntime-web in a headless Chromium: WebAssembly, another instruction set, on the same file.

A page served by this process loads onnxruntime-web, asks for work, and posts what it found.  Nothing else is loaded and
nothing outside the machine is reached.  A message is a JSON header, its length first, and the arrays' bytes.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from lsquant._util.errors import DamagedFile, LsquantError, MissingExtra, MissingFile
from lsquant.verification.runtimes.onnx_runtime import OnnxRuntime
from lsquant.verification.runtimes.onnx_session import Engine

PAGE = Path(__file__).with_name("web.html")
DIST = "onnxruntime-web/dist"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TYPES = {".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm"}
WAIT = 600.0  # seconds for one answer


class WebRuntime(OnnxRuntime):
    """onnxruntime-web, which takes no options."""

    name = "onnxruntime-web"

    @contextmanager
    def engine(self, recommended: dict[str, str], node_modules: Any) -> Iterator[Engine]:
        with Browser(node_modules) as browser:
            yield Engine(browser.title, [{}], browser.open)


class Browser:
    """A headless Chromium with onnxruntime-web, until the block ends.

    The browser is that of the environment variable LSQUANT_CHROMIUM, else what is installed as one of BROWSERS.

    node_modules: the folder that ``npm install onnxruntime-web`` made; default: LSQUANT_NODE_MODULES.

    Raises: MissingExtra without the package or a browser; LsquantError where the browser does not answer.
    """

    def __init__(self, node_modules: str | os.PathLike[str] | None = None) -> None:
        place = node_modules or os.environ.get("LSQUANT_NODE_MODULES")
        hint = "run `npm install onnxruntime-web` and give its node_modules folder (LSQUANT_NODE_MODULES)"
        if place is None:
            raise MissingExtra(f"onnxruntime-web is not installed with Python packages: {hint}")
        self.dist = Path(place) / DIST
        if not (self.dist / "ort.wasm.min.mjs").is_file():
            raise MissingFile(f"{self.dist} has no ort.wasm.min.mjs: {hint}")
        named = os.environ.get("LSQUANT_CHROMIUM")
        found = shutil.which(named) if named else next(filter(None, map(shutil.which, BROWSERS)), None)
        if found is None:
            raise MissingExtra(
                f"no browser {named or ' or '.join(BROWSERS)} is on the PATH (LSQUANT_CHROMIUM names one)"
            )
        self.program = found
        package = json.loads((self.dist.parent / "package.json").read_text(encoding="utf-8"))
        self.title = f"onnxruntime-web {package['version']} (WebAssembly, Chromium)"
        self.models: list[bytes] = []
        self.work: queue.Queue[bytes] = queue.Queue()
        self.answers: queue.Queue[bytes] = queue.Queue()

    def __enter__(self) -> Browser:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        url = f"http://127.0.0.1:{self.server.server_port}/"
        command = [self.program, *flags, f"--user-data-dir={self.profile.name}", url]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.server.shutdown()
        self.server.server_close()
        self.profile.cleanup()

    def open(self, source: str | bytes, options: dict[str, str]) -> _Loaded:
        """Open a session on a model.

        source: a path, or a serialized model.

        Raises: DamagedFile where onnxruntime-web refuses it.
        """
        where = source if isinstance(source, str) else "the model"
        self.models.append(Path(source).read_bytes() if isinstance(source, str) else source)
        header, _ = self.ask({"do": "open", "model": len(self.models) - 1})
        if "error" in header:
            raise DamagedFile(f"onnxruntime-web refuses {where}: {header['error']}")
        return _Loaded(self, header)

    def ask(self, header: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Send a message and wait for the answer."""
        self.work.put(message(header, arrays))
        waited = 0.0
        while True:
            try:
                return parsed(self.answers.get(timeout=1.0))
            except queue.Empty:
                waited += 1.0
            if self.process.poll() is not None or waited > WAIT:
                state = "ended" if self.process.poll() is not None else f"did not answer for {WAIT:.0f} s"
                raise LsquantError(f"{self.program} {state} while running onnxruntime-web")


class _Loaded:
    def __init__(self, browser: Browser, header: dict[str, Any]) -> None:
        self.browser, self.number = browser, header["session"]
        self.inputs, self.outputs = header["inputs"], header["outputs"]

    def run(self, names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        request = {"do": "run", "session": self.number, "feeds": list(feeds), "names": list(names)}
        return self._asked(request, list(feeds.values()))[1]

    def timer(self, feeds: dict[str, np.ndarray]) -> Callable[[int], float]:
        """Return a function that measures so many runs in a row, inside the page: seconds of one."""
        self._asked({"do": "hold", "session": self.number, "feeds": list(feeds)}, list(feeds.values()))

        def seconds(times: int) -> float:
            header, _ = self._asked({"do": "time", "session": self.number, "times": times})
            return header["milliseconds"] / 1000 / times

        return seconds

    def _asked(self, request: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> tuple[dict[str, Any], list[Any]]:
        header, found = self.browser.ask(request, arrays)
        if "error" in header:
            raise LsquantError(f"onnxruntime-web cannot run the model: {header['error']}")
        return header, found


def message(header: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> bytes:
    """Return a message: the header, with dtypes and shapes added, and the arrays' bytes, each from a multiple of 8."""
    parts = [np.ascontiguousarray(a) for a in arrays]
    layout = [[a.dtype.name, list(a.shape)] for a in parts]
    head = json.dumps({**header, "arrays": layout}).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *(a.tobytes() + b"\0" * (-a.nbytes % 8) for a in parts)])


def parsed(data: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return the header and the arrays of a message."""
    place = 8 + int.from_bytes(data[:8], "little")
    header, arrays = json.loads(data[8:place]), []
    for name, shape in header["arrays"]:
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(data, name, count, place).reshape(shape))
        place += -(-arrays[-1].nbytes // 8) * 8
    return header, arrays


def _handler(browser: Browser) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, _, name = self.path.strip("/").partition("/")
            if not kind:
                self.send(PAGE.read_bytes(), ".html")
            elif kind == "dist" and (file := browser.dist / name).parent == browser.dist and file.is_file():
                self.send(file.read_bytes(), file.suffix)
            elif kind == "model":
                self.send(browser.models[int(name)])
            elif kind == "work":
                try:
                    self.send(browser.work.get(timeout=20.0))
                except queue.Empty:
                    self.send(b"")
            else:
                self.send_error(404)

        def do_POST(self) -> None:
            browser.answers.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send(b"")

        def send(self, data: bytes, suffix: str = "") -> None:
            with suppress(ConnectionError):  # the browser has ended
                self.send_response(200)
                self.send_header("Content-Type", TYPES.get(suffix, "application/octet-stream"))
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
