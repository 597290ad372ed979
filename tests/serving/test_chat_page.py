"""The chat page: its policy by itself, its behaviour in a headless Chromium against a fake OpenAI endpoint."""

import asyncio
import base64
import hashlib
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from websockets.sync.client import connect

from app.serving import protocol
from app.serving.auth import ApiKeyMiddleware, Key, KeyStore, digest
from app.serving.quota import Refusal

PAGE = Path(__file__).resolve().parents[2] / "app" / "serving" / "chat.html"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "sk-right"
PHONE, DESKTOP = (390, 844), (1280, 800)
WAIT_SECONDS = 15


def pieces(tag: str) -> list[str]:
    return re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("tag", ["script", "style"])
def test_the_policy_names_the_only_script_and_style(tag: str) -> None:
    (content,) = pieces(tag)
    policy = re.findall(rf"{tag}-src ('sha256-.*?')", PAGE.read_text(encoding="utf-8"))
    assert policy == [f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"]


def test_nothing_comes_from_elsewhere() -> None:
    source = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"https?:|//[a-z]|@import|<link(?! rel=\"icon\" href=\"data:)", source)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", source)
    assert not re.findall(r"\son[a-z]+=|\sstyle=", source)  # the policy would stop them


class Endpoint:
    """A fake OpenAI endpoint that does what the last question says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.client_gone = threading.Event()
        routes = [
            Route("/", lambda _: HTMLResponse(PAGE.read_text(encoding="utf-8"))),
            Route("/v1/models", lambda _: JSONResponse({"object": "list", "data": [{"id": "tiny"}, {"id": "big"}]})),
            Route("/v1/lineage", lambda _: JSONResponse({"model": "tiny", "digest": "3f" * 32, "inputs": []})),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        keys = KeyStore(fixed=[Key(name="one", digest=digest(KEY))])
        app = ApiKeyMiddleware(Starlette(routes=routes), keys, open_paths=["/"])
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"

    async def chat(self, request: Request) -> Response:
        body = json.loads(await request.body())
        self.bodies.append(body)
        question = body["messages"][-1]["content"]
        refusals = {
            "too large": protocol.too_many_requests(Refusal(float("inf"), "tokens")),
            "broken": protocol.openai_error(500, "the engine is gone"),
        }
        if len(self.bodies) == 1:
            refusals["busy"] = protocol.too_many_requests(Refusal(0.5, "requests"))
        answer = refusals.get(question)
        if answer is None:
            return StreamingResponse(self.stream(question), media_type="text/event-stream")
        return Response(answer.body, answer.status, {name.decode(): value.decode() for name, value in answer.headers})

    async def stream(self, question: str) -> AsyncIterator[bytes]:
        try:
            while question == "endless":
                yield chunk("好")
                await asyncio.sleep(0.01)
        finally:
            if question == "endless":
                self.client_gone.set()
        events = b"".join(chunk(piece) for piece in (f"你说：{question} ", "👍🏽", "\n第二行"))
        for start in range(0, len(events), 7):  # characters and events in halves
            yield events[start : start + 7]
            await asyncio.sleep(0.001)
        if question == "cut":
            return
        if question == "error":
            yield protocol.stream_error("the replica died")
        reason = {"filter": "content_filter", "long": "length"}.get(question, "stop")
        yield protocol.final_chunk(reason, {"object": "chat.completion.chunk"})
        yield b'data: {"choices": [], "usage": {"completion_tokens": 21}}\n\n' + protocol.DONE


def chunk(content: str) -> bytes:
    event = {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None}]}
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


class Browser:
    """One page of a Chromium, driven by its own debugging protocol."""

    def __init__(self, websocket_url: str) -> None:
        self.socket = connect(websocket_url, max_size=None, proxy=None)
        self.num_calls = 0
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.num_calls += 1
        self.socket.send(json.dumps({"id": self.num_calls, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=WAIT_SECONDS))
            if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(message["params"]))
            if message.get("id") == self.num_calls:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def js(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not self.js(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"{expression}; the page says: {self.js('document.body.innerText')}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        return str(self.js(f"document.querySelector({selector!r})?.innerText ?? ''"))

    def click(self, selector: str) -> None:
        self.js(f"document.querySelector({selector!r}).click()")

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        text = {"text": "\r"} if key == "Enter" and code != 229 else {}
        press = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **press, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **press)

    def enter(self, selector: str, text: str) -> None:
        self.js(f"document.querySelector({selector!r}).select()")  # focuses it too
        self.call("Input.insertText", text=text)

    def ask(self, question: str) -> None:
        self.enter("#question", question)
        self.press("Enter", 13)

    def open(self, url: str, size: tuple[int, int] = DESKTOP, language: str = "en", key: str = KEY) -> None:
        """The page as a first visitor sees it, but for the key."""
        screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 2, "mobile": size != DESKTOP}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.protocol === 'http:'")
        settings = {"zero-to-one.language": language} | ({"zero-to-one.key": key} if key else {})
        self.js(f"localStorage.clear(); Object.assign(localStorage, {json.dumps(settings)}); window.isOld = true")
        self.call("Page.reload")
        self.wait_for("!window.isOld && document.readyState === 'complete'")
        self.complaints.clear()
        if key:
            self.wait_for("find('model').value === 'tiny'")


@pytest.fixture(name="endpoint")
def endpoint_fixture() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    endpoint.thread.start()
    while not endpoint.server.started:
        assert endpoint.thread.is_alive()
        time.sleep(0.01)
    yield endpoint
    endpoint.server.force_exit = endpoint.server.should_exit = True
    endpoint.thread.join(WAIT_SECONDS)


@pytest.fixture(scope="module", name="browser")
def browser_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    profile = tmp_path_factory.mktemp("chromium")
    options = ["headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-proxy-server", "no-first-run"]
    options += ["remote-debugging-port=0", f"user-data-dir={profile}"]
    command = [CHROMIUM, *(f"--{option}" for option in options), "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (profile / "DevToolsActivePort").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        port = (profile / "DevToolsActivePort").read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [target for target in json.load(answer) if target["type"] == "page"]
        yield Browser(pages[0]["webSocketDebuggerUrl"])
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_key_is_asked_for_kept_and_forgotten(browser: Browser, endpoint: Endpoint) -> None:
    browser.open(endpoint.url, key="")
    browser.wait_for("find('key-dialog').open")
    browser.enter("#key", "sk-wrong")
    browser.press("Enter", 13)
    browser.wait_for("find('key-problem').innerText.startsWith('The key was not accepted.')")
    browser.enter("#key", KEY)
    browser.press("Enter", 13)
    browser.wait_for("find('model').value === 'tiny' && !find('key-dialog').open")
    browser.wait_for("find('about').innerText.includes('model version 3f3f3f3f3f3f')")
    assert browser.js("localStorage.getItem('zero-to-one.key')") == KEY
    browser.click("#key-button")
    browser.click("#forget")
    assert browser.js("localStorage.getItem('zero-to-one.key')") is None
    assert browser.js("[find('model').length, find('key').value]") == [0, ""]


@pytest.mark.slow
def test_an_answer_streams_and_the_conversation_goes_on(browser: Browser, endpoint: Endpoint) -> None:
    browser.open(endpoint.url)
    browser.js("find('model').value = 'big'")
    browser.ask("你好 <b>&amp;")
    browser.wait_for("document.querySelector('.figures')")
    answer = "你说：你好 <b>&amp; 👍🏽\n第二行"
    assert browser.js("document.querySelector('.model .text').textContent") == f"Model: {answer}"
    assert re.fullmatch(r"\d+\.\d\d s to first token · \d+\.\d tokens/s · 21 tokens", browser.text(".figures"))
    browser.ask("again")
    browser.wait_for("document.querySelectorAll('.figures').length === 2")
    first, second = endpoint.bodies
    assert (first["model"], first["stream"]) == ("big", True)
    assert second["messages"] == [
        {"role": "user", "content": "你好 <b>&amp;"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "again"},
    ]
    browser.click("#new")
    browser.ask("new")
    browser.wait_for("document.querySelectorAll('.figures').length === 1")
    assert len(endpoint.bodies[2]["messages"]) == 1
    assert browser.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("way", ["button", "escape", "new"])
def test_stopping_reaches_the_endpoint(browser: Browser, endpoint: Endpoint, way: str) -> None:
    browser.open(endpoint.url)
    browser.ask("endless")
    browser.wait_for("document.querySelector('.model .text')?.textContent.includes('好好')")
    assert browser.js("[find('send').hidden, find('stop').hidden]") == [True, False]
    if way == "escape":
        browser.press("Escape", 27)
    else:
        browser.click("#stop" if way == "button" else "#new")
    assert endpoint.client_gone.wait(WAIT_SECONDS)
    browser.wait_for("find('stop').hidden && !find('send').hidden")
    assert (browser.text(".figures") == "Stopped.") == (way != "new")
    browser.ask("more")
    browser.wait_for("document.querySelector('.model:last-child .figures')?.innerText.includes('21 tokens')")
    assert len(endpoint.bodies[1]["messages"]) == (1 if way == "new" else 3)


@pytest.mark.slow
def test_enter_sends_but_not_with_shift_nor_in_an_input_method(browser: Browser, endpoint: Endpoint) -> None:
    browser.open(endpoint.url)
    browser.enter("#question", "one")
    browser.press("Enter", 13, modifiers=8)
    browser.call("Input.imeSetComposition", text="ni", selectionStart=2, selectionEnd=2)
    browser.press("Enter", 229)
    assert endpoint.bodies == []
    browser.call("Input.insertText", text="你")
    assert browser.js("find('question').value") == "one\n你"
    browser.press("Enter", 13)
    browser.wait_for("document.querySelector('.figures')")
    assert endpoint.bodies[0]["messages"][0]["content"] == "one\n你"
    assert browser.js("find('question').value") == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "note", "retry"),
    [
        ("too large", "Too many requests. Request too large", False),
        ("broken", "The endpoint reported an error (500): the engine is gone", True),
        ("filter", "Stopped by the content filter.", False),
        ("long", "The answer reached its length limit.", False),
        ("cut", "The connection broke off; the answer is not complete.", True),
        ("error", "The endpoint reported an error: the replica died", True),
    ],
)
def test_what_went_wrong_is_said(browser: Browser, endpoint: Endpoint, question: str, note: str, retry: bool) -> None:
    browser.open(endpoint.url)
    browser.ask(question)
    browser.wait_for("document.querySelector('.note')")
    assert browser.text(".note").startswith(note)
    assert browser.js("Boolean(document.querySelector('.note button'))") == retry
    browser.ask("next")
    browser.wait_for("document.querySelector('.model:last-child .figures')")
    told = [message["content"] for message in endpoint.bodies[1]["messages"]]
    assert (question in told) == (question == "long")  # what was not answered is no part of the conversation


@pytest.mark.slow
def test_after_429_it_may_be_tried_again_in_time(browser: Browser, endpoint: Endpoint) -> None:
    browser.open(endpoint.url)
    browser.ask("busy")
    browser.wait_for("document.querySelector('.note button')?.disabled")
    assert browser.text(".note button") == "Try again in 1 s"
    browser.wait_for("!document.querySelector('.note button').disabled")
    browser.click(".note button")
    browser.wait_for("document.querySelector('.figures')")
    assert browser.js("document.querySelectorAll('.user').length") == 1


@pytest.mark.slow
def test_without_a_network_it_says_so_and_goes_on_when_it_is_back(browser: Browser, endpoint: Endpoint) -> None:
    browser.open(endpoint.url)
    conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.call("Network.emulateNetworkConditions", offline=True, **conditions)
    browser.ask("hello")
    browser.wait_for("document.querySelector('.note')")
    assert browser.text(".note").startswith("No connection to the endpoint.")
    browser.call("Network.emulateNetworkConditions", offline=False, **conditions)
    browser.click(".note button")
    browser.wait_for("document.querySelector('.figures')")


@pytest.mark.slow
def test_a_key_revoked_in_between_is_asked_for_again(browser: Browser, endpoint: Endpoint) -> None:
    browser.open(endpoint.url)
    browser.js("localStorage.setItem('zero-to-one.key', 'revoked')")
    browser.ask("hello")
    browser.wait_for("find('key-dialog').open")
    assert "not accepted" in browser.text("#key-problem")


@pytest.mark.slow
def test_both_languages_say_everything(browser: Browser, endpoint: Endpoint) -> None:
    browser.open(endpoint.url, language="zh")
    assert browser.js("Object.keys(TEXTS.zh).sort().join() === Object.keys(TEXTS.en).sort().join()")
    assert (browser.text("#send"), browser.js("document.documentElement.lang")) == ("发送", "zh-CN")
    browser.click("#language")
    assert (browser.text("#send"), browser.js("document.documentElement.lang")) == ("Send", "en")
    assert browser.js("localStorage.getItem('zero-to-one.language')") == "en"


@pytest.mark.slow
@pytest.mark.parametrize("size", [PHONE, DESKTOP, (320, 568)])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_it_fits_screen_and_finger(browser: Browser, endpoint: Endpoint, size: tuple[int, int], language: str) -> None:
    browser.open(endpoint.url, size, language)
    browser.ask("x" * 500)
    browser.wait_for("document.querySelector('.figures')")
    assert browser.js("document.scrollingElement.scrollWidth") <= size[0]
    assert browser.js("document.scrollingElement.scrollHeight") <= size[1]
    shown = "[...document.querySelectorAll('button, select, textarea')].filter((e) => e.offsetParent)"
    assert browser.js(f"Math.min(...{shown}.map((e) => e.offsetHeight))") >= 44
    assert browser.js(f"Math.max(...{shown}.map((e) => e.getBoundingClientRect().right))") <= size[0]
    assert browser.js("parseFloat(getComputedStyle(find('question')).fontSize)") >= 16  # else phones zoom in


@pytest.mark.slow
def test_every_control_has_a_name(browser: Browser, endpoint: Endpoint) -> None:
    browser.open(endpoint.url)
    roles = {"button", "textbox", "combobox", "log"}
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    browser.js("openKeyDialog()")
    nodes += browser.call("Accessibility.getFullAXTree")["nodes"]
    names = [node["name"]["value"] for node in nodes if node.get("role", {}).get("value") in roles]
    assert {"Model", "New", "Key", "Conversation", "Ask anything", "Send", "API key", "Save", "Forget"} <= set(names)
    assert all(names)


@pytest.mark.slow
def test_no_text_becomes_markup(browser: Browser, endpoint: Endpoint) -> None:
    browser.open(endpoint.url)
    browser.ask("<img src=x onerror='window.broken = true'><script>window.broken = true</script>")
    browser.wait_for("document.querySelector('.figures')")
    assert browser.js("document.querySelectorAll('#log img, #log script').length") == 0
    attempt = "(() => { try { document.body.innerHTML = 'x' } catch (error) { return error.name } })()"
    assert browser.js(attempt) == "TypeError"
