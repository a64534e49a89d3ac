"""In the guest: the daemon starts with the embedded model and answers."""

import json
import re
import subprocess
import sys
import threading
import time
import urllib.request

import checks

PROMPT = "Once upon a time"


def the_daemon_answers_on_a_machine_with_cpu_less_nodes() -> str:
    begin = time.monotonic()
    command = [sys.executable, "-m", "hybridgen", "serve", "--port", "0", "--kv-cache-memory-bytes", "256MiB"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    url, lines = "", []
    for line in server.stdout:
        lines.append(line)
        if match := re.search(r" at (http:\S+)", line):
            url = match[1]
            break
    assert url, "".join(lines)
    threading.Thread(target=server.stdout.read, daemon=True).start()
    ready = time.monotonic() - begin
    body = json.dumps({"prompt": PROMPT, "max_tokens": 16, "temperature": 0}).encode()
    request = urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    assert answer["usage"]["completion_tokens"] >= 1, answer
    server.terminate()
    assert server.wait(60) == 0
    took = time.monotonic() - begin
    return f"ready after {ready:.0f} s; {PROMPT!r} continues {answer['choices'][0]['text']!r}; ended after {took:.0f} s"


if __name__ == "__main__":
    checks.run([the_daemon_answers_on_a_machine_with_cpu_less_nodes])
