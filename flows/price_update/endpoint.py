"""Stands for an Edge Function: checks margins over HTTP. `python endpoint.py [PORT]`; `MARGINS_TOKEN` is its secret."""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LEAST_MARGIN = 1.1


class Endpoint(BaseHTTPRequestHandler):
    """Answers what the step's input deserves; the answer is the step's result."""

    def do_POST(self) -> None:
        """Check the margin of each category that was priced."""
        if self.headers.get("Authorization") != f"Bearer {os.environ['MARGINS_TOKEN']}":
            self._answer(401, {"error": "who are you?"})
            return
        upstream = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        priced = [each for name, each in upstream.items() if name != "payload"]
        low = [each["category"] for each in priced if float(each["revenue"]) < LEAST_MARGIN * float(each["cost"])]
        if low:
            self._answer(422, {"error": f"margins are too low: {', '.join(low)}"})
            return
        self._answer(200, {"checked": len(priced), "run": self.headers["Pgflow-Run-Id"]})

    def _answer(self, status: int, body: dict[str, object]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    address = ("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8099)
    with ThreadingHTTPServer(address, Endpoint) as server:
        server.serve_forever()
