"""`clipcap serve`: a real server, concurrent clients, a real browser."""

import base64
import csv
import html
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import clipcap_hf
import pytest
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.captioning import caption_images
from clipcap_hf.cli import main
from clipcap_hf.data import load_emoji
from clipcap_hf.serve import BatchedCaptioner, Settings, check_address
from clipcap_hf.serve_page import results_csv, results_page
from PIL import Image


@pytest.fixture(scope="module")
def captioner():
    model = ClipCapForConditionalGeneration.from_pretrained(clipcap_hf.EMOJI_MINI).eval()
    return model, ClipCapProcessor.from_pretrained(clipcap_hf.EMOJI_MINI)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings")
    paths = []
    for number, row in enumerate(load_emoji("new_design").select(range(5, 1600, 200))):
        paths.append(str(folder / f"{number}.png"))
        row["image"].save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def expected(captioner, drawings):
    return [found.captions[0] for found in caption_images(*captioner, drawings, progress=False)]


# -- without a server


def test_requests_with_the_same_settings_go_together(captioner, drawings, expected, monkeypatch):
    served = BatchedCaptioner(*captioner)
    batches = []
    together = served._caption
    monkeypatch.setattr(served, "_caption", lambda items, way: batches.append(len(items)) or together(items, way))
    beams = Settings(decoding="beam search", beams=3, captions=2)
    answers = served([([path], Settings()) for path in drawings[:4]] + [(drawings[4:6], beams), ([], Settings())])
    assert batches == [4, 2]
    assert [answer[0][0].captions for answer in answers[:4]] == [[caption] for caption in expected[:4]]
    assert [len(result.captions) for result, _ in answers[4]] == [2, 2] and answers[5] == []
    assert all(score < 0 for answer in answers for result, _ in answer for score in result.scores)


def test_requests_that_wait_go_together(captioner, drawings, expected, monkeypatch):
    served = BatchedCaptioner(*captioner)
    batches = []
    together = served._caption
    monkeypatch.setattr(served, "_caption", lambda items, way: batches.append(len(items)) or together(items, way))
    prompts = [""] * len(drawings) + ["a dog " * 100]
    with ThreadPoolExecutor(len(prompts)) as visitors:
        with served._turn:  # as if the model were busy
            answers = [
                visitors.submit(served.caption, [path], Settings(prompt=prompt))
                for path, prompt in zip(drawings + drawings[:1], prompts)
            ]
            while len(served._waiting) < len(prompts):
                time.sleep(0.01)
        answers = [answer.result(timeout=60)[0][0] for answer in answers]
    assert sorted(batches) == [1, len(drawings)]
    assert [answer.captions for answer in answers[:-1]] == [[caption] for caption in expected]
    assert "shorten the prompt" in answers[-1].error, "and nobody else's request suffers from it"


def test_a_fault_of_ours_ends_every_request_that_it_concerns(captioner, drawings, monkeypatch):
    served = BatchedCaptioner(*captioner)

    def fail(*_):
        raise RuntimeError("/secret/path: out of memory")

    monkeypatch.setattr(served, "_caption", fail)
    ((result, _),) = served.caption(drawings[:1], Settings())
    assert result.error == "captioning failed; the server's log says why"
    monkeypatch.setattr(served, "_read", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        served.caption(drawings[:1], Settings())
    assert not served._turn.locked() and not served._waiting


def test_bad_files(captioner, tmp_path):
    (tmp_path / "page.png").write_text("<html><script>alert(1)</script></html>")
    (tmp_path / "drawing.png").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (tmp_path / "empty.jpg").touch()
    Image.new("1", (9000, 6000)).save(tmp_path / "large.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "postscript.png", "EPS")
    names = ("page.png", "drawing.png", "empty.jpg", "postscript.png", "large.png")
    paths = [str(tmp_path / name) for name in names]
    (answer,) = BatchedCaptioner(*captioner)([(paths, Settings())])
    errors = [result.error for result, _ in answer]
    assert all("not an image that can be read" in error for error in errors[:4])
    assert "9000 x 6000 pixels are more than the 40 million" in errors[4]
    assert not any(str(tmp_path) in error for error in errors), "where files lie is nobody's business"
    assert not any(result.captions for result, _ in answer)


def test_nothing_a_visitor_sends_becomes_html(captioner, tmp_path):
    name = tmp_path / "<img src=x onerror=alert(1)>.png"
    Image.new("RGB", (32, 32), "red").save(name)
    (answer,) = BatchedCaptioner(*captioner)([([str(name)], Settings(prompt="<b>bold"))])
    page = results_page(answer)
    assert "<img src=x" not in page and "<b>" not in page and "&lt;img src=x" in page


def test_unknown_decoding(captioner, drawings):
    ((result, _),) = BatchedCaptioner(*captioner).caption(drawings[:1], Settings(decoding="tea leaves"))
    assert "decoding must be one of greedy, beam search, sampling" in result.error


def test_table_of_results(captioner, drawings, tmp_path):
    (tmp_path / "page.png").write_text("<html></html>")
    beams = Settings(decoding="beam search", beams=3, captions=2)
    (answer,) = BatchedCaptioner(*captioner)([([drawings[0], str(tmp_path / "page.png")], beams)])
    results = [result for result, _ in answer]
    rows = list(csv.reader(io.StringIO(results_csv(results))))
    assert rows[0] == ["file", "caption", "probability", "error"]
    assert [row[1] for row in rows[1:3]] == results[0].captions and all(0 < float(row[2]) < 1 for row in rows[1:3])
    assert rows[3][0] == "page.png" and "not an image that can be read" in rows[3][3]
    page = results_page(answer)
    (table,) = re.findall(r'download="captions.csv" href="data:text/csv;base64,([^"]+)"', page)
    assert base64.b64decode(table).decode("utf-8-sig") == results_csv(results)
    assert f'data-captions="{html.escape(chr(10).join(results[0].captions))}"' in page
    assert "<button" not in results_page(answer[1:]), "nothing to copy"


def test_addresses_are_checked_before_anything_is_loaded():
    check_address("127.0.0.1", None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {taken}: another program listens there; choose another --port"):
            check_address("127.0.0.1", taken)
    for host, says in (("999.1.1.1", "no such address"), ("192.0.2.1", "not an address of this machine")):
        with pytest.raises(ValueError, match=f"--host {host}: {says}"):
            check_address(host, 7860)
    with pytest.raises(ValueError, match="--port 70000: a port is a number from 1 to 65535"):
        check_address("127.0.0.1", 70000)


@pytest.mark.parametrize("option", [("--host", "999.1.1.1"), ("--port", "70000"), ("--examples", "/nowhere")])
def test_a_bad_option_ends_at_once(option, capsys):
    try:
        code = main(["serve", *option])
    except SystemExit as end:
        code = end.code
    assert code != 0 and option[0] in capsys.readouterr().err


def test_import_is_lazy():
    code = "import sys, clipcap_hf, clipcap_hf.cli; sys.exit('gradio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- with one


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("gradio", reason="needs gradio: pip install 'clipcap-hf[serve]'")
    command = [sys.executable, "-m", "clipcap_hf.cli", "serve", "--model", "emoji-mini", "--max-file-size", "2mb"]
    command += ["--allowed-host", "page.example"]
    # Background jobs of a shell ignore Ctrl-C, and so would their children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    line = process.stdout.readline()
    if not line:
        pytest.fail(process.communicate()[1])
    yield re.search(r"http://127\.0\.0\.1:\d+", line)[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0, "Ctrl-C ends it"


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def upload(server: str, name: str, data: bytes) -> str:
    boundary = "x" * 20
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode() + data
    request = urllib.request.Request(
        f"{server}/gradio_api/upload",
        data=body + f"\r\n--{boundary}--\r\n".encode(),
        headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)[0]


def ask(server: str, *files: str, decoding: str = "greedy") -> str:
    """Request captions of uploaded files, and return the last event of the answer."""
    data = [[{"path": file, "meta": {"_type": "gradio.FileData"}} for file in files]]
    body = json.dumps({"data": [*data, decoding, 5, 1, 1.0, 0.9, 30, ""]}).encode()
    request = urllib.request.Request(
        f"{server}/gradio_api/call/caption", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        event = json.load(response)["event_id"]
    with urllib.request.urlopen(f"{server}/gradio_api/call/caption/{event}", timeout=60) as response:
        return response.read().decode()


def captions(answer: str) -> list[str]:
    (line,) = [line for line in answer.splitlines() if line.startswith("data: ")]
    return [record["captions"][0] for record in json.loads(line.removeprefix("data: "))[1]]


def test_clients_that_come_together_get_their_own_captions(server, drawings, expected):
    uploaded = [upload(server, f"{number}.png", open(path, "rb").read()) for number, path in enumerate(drawings)]
    with ThreadPoolExecutor(len(uploaded)) as clients:
        alone, together = [], []
        for _ in range(3):  # the best of each: a busy machine makes single ones meaningless
            started = time.perf_counter()
            one_by_one = [captions(ask(server, path)) for path in uploaded]
            alone.append(time.perf_counter() - started)
            started = time.perf_counter()
            answers = list(clients.map(lambda path: captions(ask(server, path)), uploaded))
            together.append(time.perf_counter() - started)
            assert one_by_one == answers == [[caption] for caption in expected]
    print(f"{len(uploaded)} clients: {min(alone):.2f} s one after the other, {min(together):.2f} s together")


def test_a_bad_request_spoils_no_other(server, drawings, expected):
    path = upload(server, "0.png", open(drawings[0], "rb").read())
    with ThreadPoolExecutor(9) as clients:
        good, bad = (
            [clients.submit(ask, server, path, decoding=way) for _ in range(count)]
            for way, count in (("greedy", 6), ("tea leaves", 3))
        )
    assert all(captions(answer.result()) == [expected[0]] for answer in good)
    assert all("not in the list of choices" in answer.result() for answer in bad)
    assert "At most 16 images at once; these are 17" in ask(server, *[path] * 17)


def test_no_file_of_the_server_is_readable(server, drawings):
    for place in ("/etc/passwd", clipcap_hf.__file__, f"{clipcap_hf.EMOJI_MINI}/config.json", drawings[0]):
        assert status(f"{server}/gradio_api/file={place}") == 403
        assert "not uploaded by a user" in ask(server, place)
    for path in ("file=/etc/passwd", "static/..%2f..%2f..%2fetc/passwd", "gradio_api/file=..%2f..%2fetc/passwd"):
        assert status(f"{server}/{path}") in (403, 404)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:1", True),
        ("localhost", True),
        ("[::1]:80", True),
        ("page.example", True),
        ("evil.example:7860", False),
        ("evil.gradio.live", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
    ],
)
def test_other_sites_cannot_point_their_name_here(server, host, allowed):
    for path in ("", "/config", "/gradio_api/info"):
        request = urllib.request.Request(server + path, headers={"Host": host})
        try:
            code = urllib.request.urlopen(request, timeout=20).status
        except urllib.error.HTTPError as error:
            code = error.code
        assert (code == 403) is not allowed, path


def test_parameters_of_the_api_have_names(server):
    with urllib.request.urlopen(f"{server}/gradio_api/info", timeout=20) as response:
        info = json.load(response)
    names = [parameter["parameter_name"] for parameter in info["named_endpoints"]["/caption"]["parameters"]]
    settings = ["decoding", "beams", "captions", "temperature", "top_p", "max_new_tokens", "prompt"]
    assert names == ["files", *settings]
    assert list(info["named_endpoints"]) == ["/caption"]


def test_page_says_what_the_model_knows_and_offers_examples(server):
    with urllib.request.urlopen(f"{server}/config", timeout=20) as response:
        config = json.load(response)
    texts = [component["props"].get("value") for component in config["components"] if component["type"] == "markdown"]
    assert any("drawings of emoji only" in text for text in texts)
    (gallery,) = [component["props"]["value"] for component in config["components"] if component["type"] == "gallery"]
    assert len(gallery) == 6
    path = gallery[0]["image"]["path"]
    assert status(f"{server}/gradio_api/file={path}") == 200


def test_large_uploads_are_refused(server):
    noise = io.BytesIO()
    Image.effect_noise((1800, 1800), 90).save(noise, "PNG")
    assert noise.tell() > 2_000_000
    with pytest.raises(urllib.error.HTTPError) as error:
        upload(server, "large.png", noise.getvalue())
    assert error.value.code == 413


def test_in_a_browser(server, drawings, expected, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs chromium and chromedriver")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1100"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        browser.get(server)
        wait = WebDriverWait(browser, 60)
        (tmp_path / "page.png").write_text("<html></html>")
        wait.until(lambda b: b.find_element(By.CSS_SELECTOR, "input[type=file]")).send_keys(
            "\n".join([drawings[0], str(tmp_path / "page.png")])
        )
        wait.until(lambda b: "page.png" in b.page_source)
        button = next(b for b in browser.find_elements(By.TAG_NAME, "button") if b.text.strip() == "Caption")
        button.click()
        cards = wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".clipcap-card"))
        browser.save_screenshot(str(tmp_path / "page.png"))
        assert expected[0] in cards[0].text and "%" in cards[0].text
        assert "not an image that can be read" in cards[1].text
        hosts = {
            re.match(r"\w+://[^/:]+", r["name"])[0]
            for r in browser.execute_script(
                "return performance.getEntriesByType('resource').map(r => ({name: r.name}))"
            )
            if r["name"].startswith("http")
        }
        assert hosts == {"http://127.0.0.1"}, "nothing is fetched from other sites"
    finally:
        browser.quit()
