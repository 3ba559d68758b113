"""A web server in a thread, whose behaviour a test chooses file by file."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Site:
    """Serves ``folder``; ``troubles[name]`` are taken one per request: a status, ``"cut"`` (the connection breaks
    halfway), ``"short"`` (half of the file, as if that were all) or bytes in its place."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.troubles, self.asked = folder, {}, Counter()
        self.always: dict[str, object] = {}
        self.listed = True
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _handler(site) -> Callable:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.partition("?")[0].strip("/")
                site.asked[name] += 1
                queue = site.troubles.get(name)
                trouble = queue.pop(0) if queue else site.always.get(name)
                if isinstance(trouble, int):
                    self.send_error(trouble)
                    return
                if not name and site.listed:
                    links = "".join(f'<a href="{file.name}">x</a>' for file in site.folder.iterdir())
                    data, kind = f"<html>{links}<a href='/etc/passwd'>y</a></html>".encode(), "text/html"
                elif (site.folder / name).is_file():
                    data, kind = (site.folder / name).read_bytes(), "application/octet-stream"
                else:
                    self.send_error(404)
                    return
                data = trouble if isinstance(trouble, bytes) else data
                data = data[: len(data) // 2] if trouble == "short" else data
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if trouble == "cut" else data)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    found = Site(folder)
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.server.shutdown()
        found.server.server_close()
        thread.join()
