"""`pretrain serve` as a command, and its page in a browser."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest
from page_cases import browser_page
from serving_cases import events, joined, served, wait_for
from test_chat import chatty  # noqa: F401 - a fixture
from test_serving import COMPLETIONS, lively  # noqa: F401 - a fixture

from pretrain.cli import app
from pretrain.core import checkpoint

pytest.importorskip("starlette", reason="needs the extra serve")


@pytest.fixture(scope="module")
def folder(lively, tmp_path_factory):  # noqa: F811
    """A checkpoint of the model that says something of each prompt."""
    place = tmp_path_factory.mktemp("served") / "small"
    checkpoint.save(*lively, place)
    return place


def test_what_is_wrong_with_the_arguments_is_said_before_torch_is_imported(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code = (
            "import sys\n"
            "from pretrain.cli import app\n"
            "for arguments in ARGUMENTS:\n"
            "    try:\n"
            "        app(['serve', *arguments])\n"
            "    except SystemExit:\n"
            "        pass\n"
            "print('torch' in sys.modules)\n"
        )
        arguments = [
            [str(folder / "nothing")], [str(folder), "--port", "70000"], [str(folder), "--rows", "0"],
            [str(folder), "--port", str(taken.getsockname()[1])], [str(folder), "--host", "nowhere.invalid"],
        ]  # fmt: skip
        result = subprocess.run(
            [sys.executable, "-c", f"ARGUMENTS = {arguments!r}\n{code}"], capture_output=True, text=True, timeout=60
        )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stdout.strip() == "False" and len(errors) == len(arguments), result.stderr
    assert all("accepted: " in line for line in errors)
    assert "Address already in use" in errors[3]


def test_without_the_extra_the_command_names_it(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setattr(sys, "argv", ["pretrain", "serve", str(folder)])
    with pytest.raises(SystemExit):
        app()
    assert capsys.readouterr().err == "error: starlette is missing; accepted: pip install 'pretrain[serve]'\n"


@pytest.mark.promise("Serving", "After a signal no connection is taken and running answers end.")
@pytest.mark.processes
def test_a_signal_lets_running_answers_end_and_refuses_new_ones(folder):
    command = [sys.executable, "-m", "pretrain", "serve", str(folder), "--port", "0", "--grace", "20", "--name", "mine"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        lines = []
        reading = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
        reading.start()
        wait_for(lambda: any("serving mine at" in line for line in lines) or process.poll() is not None, 60)
        port = int(re.search(r":(\d+)/v1", "".join(lines))[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        asked = {"model": "mine", "prompt": "import os", "max_tokens": 400, "temperature": 0, "stream": True}
        connection.request("POST", COMPLETIONS, json.dumps(asked), {"Content-Type": "application/json"})
        pieces = events(connection.getresponse())
        first = next(pieces)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: not _takes(port))
        assert joined([first, *pieces])[0][1] == "length"  # to its end
        assert process.wait(20) == 0
        reading.join(5)
        assert lines[-1] == "stopped\n" and not [line for line in lines if "Traceback" in line or "ERROR" in line]
    finally:
        process.kill()


def _takes(port):
    """Whether somebody listens."""
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.promise("Serving", "The page loads nothing from elsewhere.")
@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_talks_with_the_model_on_a_screen_and_on_a_phone(lively, width, scheme):  # noqa: F811
    with served(*lively, settings={"api_key": "secret"}) as client, browser_page(width, 800, scheme) as page:
        asked, broken = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(f"http://127.0.0.1:{client.port}/")
        page.get_by_label("API key").fill("secret")
        page.get_by_label("Tokens at most").fill("24")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Your message").fill("import os")
        page.get_by_label("Your message").press("Enter")
        page.wait_for_selector(".assistant:not(:empty)")
        page.wait_for_selector("#send:enabled")
        client.key = "secret"
        turns = [{"role": "user", "content": "import os"}]
        fields = {"messages": turns, "temperature": 0, "max_tokens": 24}
        text = client.post("/v1/chat/completions", **fields)[1]["choices"][0]["message"]["content"]
        assert page.locator(".assistant").text_content() == text
        assert page.locator("h1").text_content() == "tiny" and page.locator(".wrong").count() == 0
        page.get_by_label("Tokens at most").fill("1000000")
        page.get_by_label("Your message").fill("<b>again</b>")
        page.get_by_role("button", name="Send").click()
        page.wait_for_selector(".wrong")
        assert "max_tokens" in page.locator(".wrong").text_content()  # the server's words
        assert page.locator(".user").nth(1).text_content() == "<b>again</b>"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert all(url.startswith((f"http://127.0.0.1:{client.port}/", "data:")) for url in asked)
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark") and not broken


@pytest.mark.browser
def test_stop_on_the_page_frees_the_place(lively):  # noqa: F811
    settings = {"max_tokens": 50_000}
    with served(*lively, length=60_000, cache_tokens=60_000, settings=settings) as client, browser_page() as page:
        page.goto(f"http://127.0.0.1:{client.port}/")
        page.get_by_label("Tokens at most").fill("50000")
        page.get_by_label("Temperature").fill("0")  # with which this model never ends: drawn tokens may
        page.get_by_label("Your message").fill("import os")
        page.get_by_role("button", name="Send").click()
        wait_for(lambda: client.engine.rows and client.engine.rows[0].count > 3)
        page.get_by_role("button", name="Stop").click()
        wait_for(lambda: not client.engine.rows)
        assert page.locator("#state").text_content() == "stopped"
