"""The page of a server: what it shows, to whom, and that looking at it holds up nobody. The last tests open it in Chromium."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import connect

from paligemma_vla.serving import page
from paligemma_vla_client import pack, unpack

KEY = "correct horse"
SCRIPT = "<script>x = 1</script>"
IMAGE = "<img src=x onerror='x = 1'>"


def observation(policy: Any, **changes: Any) -> dict[str, Any]:
    """A message of LIBERO's names with smooth pictures, which JPEG keeps."""
    slope = np.linspace(0, 255, 64).astype(np.uint8)
    picture = np.stack([np.tile(slope, (48, 1)), np.full((48, 64), 90, np.uint8), np.tile(slope[::-1], (48, 1))], axis=-1)
    state = np.asarray(policy.preprocessor.statistics.state.mean, np.float32)
    message = {"observation/image": picture, "observation/wrist_image": picture[:, ::-1].copy(), "observation/state": state}
    return {**message, "prompt": "open the drawer", **changes}


@contextmanager
def client(server: Any, **options: Any) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """`ask(message)` returns the actions, or the text of a refusal."""
    with connect(server.url, **options) as connection:
        connection.recv()

        def ask(message: dict[str, Any]) -> Any:
            connection.send(pack(message))
            reply = connection.recv()
            return reply if isinstance(reply, str) else unpack(reply)["actions"]

        yield ask


def get(server: Any, path: str, authorization: str | None = None) -> tuple[bytes, Any]:
    headers = {} if authorization is None else {"Authorization": authorization}
    with urlopen(Request(f"http://127.0.0.1:{server.port}{path}", headers=headers), timeout=30) as reply:
        return reply.read(), reply.headers


def refusal_of(server: Any, path: str, authorization: str | None = None) -> HTTPError:
    with pytest.raises(HTTPError) as refused:
        get(server, path, authorization)
    refused.value.close()  # or the server would wait for it
    return refused.value


def state_of(server: Any) -> dict[str, Any]:
    return json.loads(get(server, "/state.json")[0])


def test_state_is_what_clients_sent_and_got(serve, policy):
    server = serve(seed=5)
    with client(server) as ask, client(server) as other:
        actions = ask(observation(policy))
        refusal = other(observation(policy, prompt=3))
        state = state_of(server)
    first, second = state["clients"]
    np.testing.assert_allclose(np.array(first["actions"]).T, actions, atol=10**-page.DECIMALS)
    assert first["prompt"] == "open the drawer" and first["pictures"] == [[64, 48], [64, 48]]
    assert (first["answered"], second["answered"], second["actions"]) == (1, 0, [])
    assert state["load"]["recent"] == [state["load"]["last"]] == [state["load"]["p50"]] == [first["seconds"]]
    assert (state["load"]["answers"], state["load"]["errors"]) == (1, 1)
    assert [(fault["client"], fault["text"]) for fault in state["faults"]] == [(second["number"], refusal)]
    low, high = (np.array([each[end] for each in state["policy"]["actions"]]) for end in ("low", "high"))
    assert (low - 1e-6 <= actions).all() and (actions <= high + 1e-6).all()
    assert [each["name"] for each in state["policy"]["actions"]] == policy.metadata["action_names"]
    assert state["policy"]["fingerprint"] == server.service.contract["fingerprint"]
    assert state["policy"]["seconds"] == policy.metadata["horizon"] / policy.metadata["control_hz"]
    assert state_of(server)["clients"] == []


def test_message_that_cannot_be_read_is_among_the_faults(serve):
    server = serve()
    with connect(server.url) as connection:
        connection.recv()
        connection.send("hello?")
        refusal = connection.recv()
        state = state_of(server)
    assert [fault["text"] for fault in state["faults"]] == [refusal] and state["load"]["errors"] == 1


def test_picture_is_what_the_model_sees(serve, policy):
    server, message = serve(), observation(policy)
    with client(server) as ask:
        ask(message)
        number = state_of(server)["clients"][0]["number"]
        body, headers = get(server, f"/image/{number}/1?1")
        for wrong in (f"/image/{number}/2", f"/image/{number + 1}/0", "/image/0", "/page.html", "/../page.html"):
            assert refusal_of(server, wrong).code == 404
    assert headers["Content-Type"] == "image/jpeg"
    seen = policy.preprocessor.image.apply(message["observation/wrist_image"]).transpose(1, 2, 0)
    shown = np.asarray(Image.open(io.BytesIO(body)))
    assert shown.shape == seen.shape and np.abs(shown.astype(int) - seen).mean() < 4


def test_pictures_are_encoded_for_lookers_only_once_each_and_off_the_event_loop(serve, policy, monkeypatch):
    """A picture that takes long holds up neither the policy nor the state."""
    encoded, go_on, encode = [], threading.Event(), page.encode_image

    def slowly(*arguments: Any) -> bytes:
        encoded.append(arguments)
        assert go_on.wait(20)
        return encode(*arguments)

    monkeypatch.setattr(page, "encode_image", slowly)
    server = serve()
    with client(server) as ask, client(server) as other, ThreadPoolExecutor(3) as lookers:
        ask(observation(policy))
        assert not encoded
        path = f"/image/{state_of(server)['clients'][0]['number']}"
        pending = [lookers.submit(get, server, f"{path}/{camera}") for camera in (0, 1, 0)]
        while not encoded:
            time.sleep(0.01)
        assert isinstance(other(observation(policy)), np.ndarray)
        assert state_of(server)["load"]["answers"] == 2
        go_on.set()
        front, wrist, again = (request.result()[0] for request in pending)
        assert front == again != wrist and len(encoded) == 2
        ask(observation(policy))
        assert get(server, f"{path}/0")[0] == front and len(encoded) == 4, "a new observation is encoded anew"


def test_page_asks_nobody_else_and_runs_its_own_script_only(serve):
    body, headers = get(serve(), "/")
    html = body.decode()
    assert set(re.findall(r"\w+://[^'\"`$]*", html)) == {"http://www.w3.org/2000/svg"}, "the name of SVG, which nobody fetches"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\son\w+=|\sstyle=", html)
    policy = dict(part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        assert policy[f"{kind}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")


def test_page_state_and_pictures_need_the_key(serve, policy):
    server, bearer = serve(api_key=KEY), {"Authorization": f"Api-Key {KEY}"}
    with client(server, additional_headers=bearer) as ask:
        ask(observation(policy))
        basic = f"Basic {base64.b64encode(f'me:{KEY}'.encode()).decode()}"
        number = json.loads(get(server, "/state.json", basic)[0])["clients"][0]["number"]
        for path in ("/", "/state.json", f"/image/{number}/0"):
            assert get(server, path, basic)[0]
            for wrong in (None, basic[:-4] + "AAA=", "Basic x"):
                refused = refusal_of(server, path, wrong)
                assert refused.code == 401 and refused.headers["WWW-Authenticate"].startswith("Basic ")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Debian's Chromium, without a window."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
    flags += ("disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1200,1000")
    for flag in (*flags, f"user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


def wait_until(browser: Any, expression: str) -> Any:
    """What the expression is once it is true on the page."""
    end = time.monotonic() + 20
    while not (found := browser.execute_script(f"return {expression}")):
        shown = browser.execute_script("return document.body.innerText")
        assert time.monotonic() < end, f"{expression}: not so; {browser.get_log('browser')}\n{shown}"
        time.sleep(0.05)
    return found


def test_browser_shows_clients_their_pictures_and_chunks(serve, policy, browser):
    server = serve(api_key=KEY, seed=5)
    with client(server, additional_headers={"Authorization": f"Api-Key {KEY}"}) as ask:
        browser.get(f"http://me:{KEY.replace(' ', '%20')}@127.0.0.1:{server.port}/")
        assert "None is connected" not in wait_until(browser, "document.querySelector('article') && document.body.innerText")
        actions = ask(observation(policy, prompt=SCRIPT))
        assert wait_until(browser, "document.querySelector('blockquote')?.textContent") == SCRIPT
        wait_until(browser, "[...document.querySelectorAll('img')].filter(image => image.naturalWidth).length == 2")
        charts = browser.execute_script(
            "return [...document.querySelectorAll('.chart')].map(chart => [chart.querySelector('b').textContent,"
            " chart.querySelector('polyline').getAttribute('points').split(' ').map(point => Number(point.split(',')[1]))])"
        )
        assert [name for name, _ in charts] == policy.metadata["action_names"]
        for (_, heights), values in zip(charts, actions.T, strict=True):  # the line is the chunk, but for scale and direction
            assert np.corrcoef(heights, values)[0, 1] == pytest.approx(-1, abs=1e-3)
        ask(observation(policy, prompt="close it"))
        wait_until(browser, "document.querySelector('blockquote').textContent == 'close it'")
        refusal = ask({IMAGE: 1, "prompt": "close it"})
        assert IMAGE in refusal and wait_until(browser, "document.querySelector('pre')?.textContent") == refusal
    wait_until(browser, "!document.querySelector('article') && document.body.innerText.includes('None is connected')")
    assert browser.execute_script("return typeof x") == "undefined"
    assert browser.get_log("browser") == [], "neither errors nor refusals of the security policy"


@pytest.mark.parametrize("width", [390, 1200])
def test_browser_shows_everything_within_its_width(serve, policy, browser, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    )
    server = serve()
    with client(server) as ask:
        ask(observation(policy, prompt="w" * 24))
        ask({"x" * 200: 1})
        browser.get(f"http://127.0.0.1:{server.port}/")
        wait_until(browser, "document.querySelector('blockquote') && document.querySelector('pre')")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_browser_says_that_the_server_has_gone(serve, browser):
    server = serve()
    browser.get(f"http://127.0.0.1:{server.port}/")
    wait_until(browser, "document.getElementById('live').textContent == 'live' && document.querySelector('dd')")
    server.close()
    assert "The server has not answered" in wait_until(
        browser, "document.querySelector('[role=alert]:not([hidden])')?.textContent"
    )
    assert browser.execute_script("return document.getElementById('live').textContent") == "no answer"
