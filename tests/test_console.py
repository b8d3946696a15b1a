"""The console page of `muproxy serve` before a real enclave: as HTTP gives it, and in a browser."""

import base64
import contextlib
import hashlib
import html.parser
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

import muprotocol as mp
import muproxy
from tests import browser
from tests.support import ROOT, SECONDS, TOOLS, Enclave, make_site, until

sys.path.insert(0, str(TOOLS))

import vm  # noqa: E402

PAGE = TOOLS / "console.html"
ZEN = "Beautiful is better than ugly"  # of the answer to the question below
QUESTION = "Tell me about zen."
BUDGET = 10**6  # bytes
SESSIONS = 2  # of the proxy
site = enclave = place = None


def setUpModule():
    global site, enclave, place
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    site = make_site(pathlib.Path(folder.name))
    flags = ("--port", str(vm.free_port()))  # one that it still has when it was locked
    enclave = Enclave(site, *flags, environment={"ENCLAVE_THREADS": "1"})
    unittest.addModuleCleanup(enclave.end)
    unlock()
    place = serve("--sessions", SESSIONS)


def unlock():
    tokens = [muproxy.read_token(path) for path in (site.token, site.other)]
    enclave.unlock(budget=BUDGET, users=[mp.token_hash(token) for token in tokens])


def serve(*flags, code=ROOT):
    """`muproxy serve` before the module's enclave, to the module's end; HOST:PORT."""
    command = [sys.executable, "-B", "-m", "muproxy", "serve", *enclave.flags(), *flags]
    command += ["--vocabulary", site.vocabulary, "--listen", "127.0.0.1:0", "--rate-kb", 10**6]
    command = list(map(str, command))
    process = subprocess.Popen(command, cwd=code, stderr=subprocess.PIPE, text=True)

    def end():
        process.terminate()
        process.communicate(timeout=SECONDS)

    unittest.addModuleCleanup(end)
    said = []
    while not re.search(r" on [\d.]+:\d+$", "".join(said[-1:]).strip()):
        said.append(process.stderr.readline())
        assert said[-1], said
    return said[-1].split()[-1]


def request(method, path, token=None, body=None, at=None):
    """(status, head, text) of a request."""
    head = {"Content-Type": "application/json"}
    head |= {"Authorization": f"Bearer {token}"} if token else {}
    connection = http.client.HTTPConnection(at or place, timeout=SECONDS)
    with contextlib.closing(connection):
        connection.request(method, path, body and json.dumps(body), head)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read().decode()


def token():
    return muproxy.read_token(site.token)


def state():
    status, _, text = request("GET", "/console/state", token())
    assert status == 200, text
    return json.loads(text)


def metrics():
    lines = request("GET", "/metrics")[2].splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.removeprefix("muproxy_"): float(value) for name, value in pairs}


@contextlib.contextmanager
def engine_held():
    """The engine stands still."""
    engine = enclave.pids()["engine"]
    stat = pathlib.Path(f"/proc/{engine}/stat")
    os.kill(engine, signal.SIGSTOP)
    try:
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
        yield
    finally:
        os.kill(engine, signal.SIGCONT)


@contextlib.contextmanager
def owner():
    """A session of the owner, who has proved to be it."""
    with contextlib.closing(enclave.session("owner")) as session:
        fields = enclave.unlock_token()
        session.prove({name: fields[name] for name in ("key", "model")})
        yield session


class Elements(html.parser.HTMLParser):
    """The elements of a page with their attributes, and the text of its scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.inside = [], {"script": [], "style": []}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside in self.texts:
            self.texts[self.inside].append(data)
        self.inside = None


class Http(unittest.TestCase):
    """What the proxy gives to whom."""

    def test_page(self):
        status, head, text = request("GET", "/")
        self.assertEqual((status, text), (200, PAGE.read_text("utf-8")))
        self.assertEqual(head["Content-Type"], "text/html; charset=utf-8")
        self.assertEqual(head["X-Content-Type-Options"], "nosniff")
        self.assertEqual(head["Referrer-Policy"], "no-referrer")
        self.assertEqual(head["Cache-Control"], "no-store")
        self.assertEqual(request("POST", "/")[0], 405)

    def test_policy(self):
        """One script, one style, by their hashes; nothing else is loaded, nowhere sent."""
        _, head, text = request("GET", "/")
        (policy,) = head.get_all("Content-Security-Policy")
        given = dict(part.split(None, 1) for part in policy.split(";"))
        found = {}
        for kind, (content,) in Elements(text).texts.items():
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            found[f"{kind}-src"] = f"'sha256-{digest}'"
        none = ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types")
        known = dict.fromkeys(none, "'none'") | {"require-trusted-types-for": "'script'"}
        self.assertEqual(given, known | {"connect-src": "'self'"} | found)

    def test_page_is_self_contained(self):
        elements = Elements(PAGE.read_text("utf-8")).elements
        self.assertIn("main", [tag for tag, _ in elements])
        for tag, attributes in elements:
            self.assertNotIn(tag, ("link", "img", "iframe", "object", "embed", "base"))
            for name in attributes:
                is_outside = name in ("src", "href", "srcset", "action", "style")
                self.assertFalse(is_outside or name.startswith("on"), (tag, name))
        for word in ("innerHTML", "localStorage", "sessionStorage", "cookie", "eval(", "://"):
            self.assertNotIn(word, PAGE.read_text("utf-8"))

    def test_page_that_is_not_there(self):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("muproxy.py", "muprotocol.py"):
                shutil.copy(ROOT / name, folder)
            at = serve(code=folder)
            status, _, text = request("GET", "/", at=at)
            self.assertEqual(status, 404)
            self.assertIn("tools/console.html", json.loads(text)["error"]["message"])
            self.assertEqual(request("GET", "/console/state", token(), at=at)[0], 200)

    def test_state_needs_a_token_that_the_enclave_accepts(self):
        for wrong in (None, "short", "mu-" + "0" * 64):
            status, head, text = request("GET", "/console/state", wrong)
            self.assertEqual((status, set(json.loads(text))), (401, {"error"}), text)
            self.assertNotIn("checks", text)
        self.assertEqual(request("POST", "/console/state", token())[0], 405)
        status, head, _ = request("GET", "/console/state", token())
        self.assertEqual((status, head["Cache-Control"]), (200, "no-store"))

    def test_state(self):
        """It agrees with the metrics, the reference values and what the owner is told."""
        known, now, reference = state(), metrics(), muproxy.read_reference(site.reference)
        self.assertLess(abs(known["time"] - time.time()), SECONDS)
        checks = {check["name"]: check for check in known["evidence"]["checks"]}
        self.assertEqual(checks["measurement"]["expected"], reference["measurement"])
        self.assertEqual(checks["measurement"]["got"], reference["measurement"])
        self.assertTrue(all(check["ok"] for check in checks.values()))
        evidence = {name: known["evidence"][name] for name in ("kind", "root", "meaning")}
        self.assertEqual(evidence, {"kind": "psk", "root": "psk", "meaning": muproxy.ROOTS["psk"]})
        self.assertIs(known["evidence"]["is_for_development"], True)
        self.assertLessEqual(known["evidence"]["verified"], known["time"])
        self.assertEqual(known["meter"]["received"], now["egress_bytes_total"])
        limits = {name: known["meter"][name] for name in ("rate", "burst")}
        self.assertEqual(limits, {"rate": 1024 * 10**6, "burst": 32768})
        self.assertEqual(known["enclave"]["budget_left"], now["budget_left_bytes"])
        self.assertEqual(known["enclave"]["restarts"], now["engine_restarts"])
        sessions = known["sessions"]
        self.assertEqual((sessions["open"], sessions["limit"]), (now["sessions"], SESSIONS))
        self.assertTrue(0 < sessions["idle"] <= sessions["open"])
        with owner() as session:
            told = session.command({"status": True})
        for name in ("model", "asset", "lease", "context", "budget"):
            self.assertEqual(known["enclave"][name], told[name])
        self.assertEqual(known["enclave"]["budget"], now["budget_bytes"])
        self.assertTrue(known["enclave"]["budget_left"] <= known["enclave"]["budget"])

    def test_nothing_secret_is_shown(self):
        texts = request("GET", "/")[2] + json.dumps(state()) + request("GET", "/metrics")[2]
        secrets = [path.read_text().strip() for path in (site.user_psk, site.owner_psk)]
        secrets += [token(), mp.token_hash(token()), muproxy.read_token(site.other)]
        secrets += [json.loads(site.key.read_text())["key"]]
        for secret in secrets:
            self.assertNotIn(secret, texts)

    def test_state_takes_no_session_from_those_that_answer(self):
        """All sessions are in use, the engine stands still: the page is answered all the same."""
        body = {"model": state()["enclave"]["asset"], "prompt": "The", "max_tokens": 2}
        answers = []

        def complete():
            answers.append(request("POST", "/v1/completions", token(), body)[0])

        clients = [threading.Thread(target=complete) for _ in range(SESSIONS)]
        with engine_held():
            for client in clients:
                client.start()
            until(lambda: state()["sessions"]["open"] - state()["sessions"]["idle"] == 2)
            for _ in range(5):
                self.assertEqual(state()["sessions"], {"open": 2, "idle": 0, "limit": 2})
        for client in clients:
            client.join(SECONDS)
        self.assertEqual(answers, [200] * SESSIONS)
        self.assertEqual(state()["sessions"], {"open": 2, "idle": 2, "limit": 2})

    def test_how_long_a_token_counts_as_accepted(self):
        """While a session of it is in use; then for some time, unless its session is lost."""
        pool = muproxy.Pool(enclave.session, SESSIONS)
        self.addCleanup(pool.close)
        self.assertFalse(pool.accepts(token()))
        with mock.patch.object(muproxy, "ACCEPTED_SECONDS", 0):
            with pool.session(token()):
                self.assertTrue(pool.accepts(token()))
            self.assertFalse(pool.accepts(token()))
        with mock.patch.object(muproxy, "ACCEPTED_SECONDS", 10**9):
            with pool.session(token()) as session:
                pass
            self.assertTrue(pool.accepts(token()))
            self.assertFalse(pool.accepts(muproxy.read_token(site.other)))
            session.link.shutdown(socket.SHUT_RDWR)
            self.assertFalse(pool.accepts(token()))

    def test_budget_is_the_last_that_was_told(self):
        """Also when an answer was cancelled, or another session was the last to be used."""
        body = {"model": state()["enclave"]["asset"], "prompt": "The", "max_tokens": 40}
        other = muproxy.read_token(site.other)
        for given in (token(), other):
            self.assertEqual(request("POST", "/v1/completions", given, body)[0], 200)
        with owner() as session:
            left = session.command({"status": True})["budget_left"]
        self.assertEqual(request("GET", "/v1/models", token())[0], 200)
        self.assertEqual(state()["enclave"]["budget_left"], left)  # not what that session knew
        with contextlib.closing(http.client.HTTPConnection(place, timeout=SECONDS)) as connection:
            body |= {"stream": True, "max_tokens": 900, "temperature": 2, "seed": 1}
            head = {"Authorization": f"Bearer {token()}", "Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), head)
            connection.getresponse().readline()
        until(lambda: not metrics()["requests_running"])
        with owner() as session:
            now = session.command({"status": True})["budget_left"]
        told = state()["enclave"]["budget_left"]  # before the engine's own ending was charged
        self.assertTrue(now <= told <= now + 8 < left, (now, told, left))

    def test_budget_after_an_answer_that_nobody_took_to_its_end(self):
        request = {"prompt": "The", "temperature": 2, "seed": 1, "max_new_tokens": 900}
        with enclave.ready() as session:
            before = session.ready["budget_left"]
            pieces = session.generate(request, muproxy.read_vocabulary(site.vocabulary))
            next(pieces)
            pieces.close()
            self.assertEqual(session.final["finish_reason"], "cancelled")
            self.assertEqual(session.ready["budget_left"], session.final["budget_left"])
            self.assertLess(session.ready["budget_left"], before)


@unittest.skipIf(browser.MISSING, f"not installed: {' '.join(browser.MISSING)}")
class Browser(unittest.TestCase):
    """The page as its users have it. No test here may leave a complaint, or ask another host."""

    complaints = 0  # that a test expects: answers of the proxy that are errors

    @classmethod
    def setUpClass(cls):
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        cls.driver = stack.enter_context(browser.open_browser())

    def setUp(self):
        browser.resize(self.driver, 1200, 900)
        browser.prefer(self.driver, color_scheme="light", reduced_motion="no-preference")
        browser.complaints(self.driver), browser.requested(self.driver)
        self.driver.get(f"http://{place}/")

    def tearDown(self):
        said = browser.complaints(self.driver)
        self.assertEqual(len(said), self.complaints, said)
        self.assertEqual(browser.requested(self.driver), {f"http://{place}"})

    def find(self, name):
        return self.driver.find_element("id", name)

    def text(self, name):
        return self.find(name).text

    def wait(self, condition):
        return browser.wait_for(self.driver, lambda _: condition())

    def press(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)

    def key(self, name):
        from selenium.webdriver.common.keys import Keys

        return getattr(Keys, name)

    def open(self, given=None):
        """Pass the form by keyboard."""
        self.press(given or token(), self.key("ENTER"))
        self.wait(lambda: self.find("console").is_displayed())

    def ask(self, text=QUESTION, tokens=20):
        """Send a message and wait for the answer's end; (the answer, the line below it)."""
        before, values = len(self.entries()), {"prompt": text, "max_tokens": tokens}
        script = "for (const name in arguments[0]) $(name).value = arguments[0][name]"
        self.driver.execute_script(script, values)
        self.find("prompt").send_keys(self.key("ENTER"))
        self.wait(lambda: len(self.entries()) > before + 1 and not self.find("stop").is_enabled())
        return self.ending()

    def entries(self):
        return self.driver.find_elements("css selector", "#log h3")

    def ending(self):
        answer, facts = self.driver.find_elements("css selector", "#log p")[-2:]
        return answer.text, facts.text

    def test_checks(self):
        self.open()
        checks = state()["evidence"]["checks"]
        self.assertEqual(self.text("verdict"), f"verified: {len(checks)} checks")
        rows = self.driver.find_elements("css selector", "#rows tr")
        shown = [tuple(row.text.split("\n")) for row in rows]
        facts = [(f"✓ {c['name']}", "expected", c["expected"], "got", c["got"]) for c in checks]
        self.assertEqual(shown, facts)
        self.assertIn(muproxy.ROOTS["psk"], self.text("root"))
        self.assertTrue(self.find("development").is_displayed())
        self.assertIn(muproxy.ROOTS["psk"], self.text("development"))
        for name in ("model", "asset", "lease"):
            self.assertEqual(self.text(name), state()["enclave"][name])
        self.assertEqual(self.text("restarts"), "0")
        self.assertRegex(self.text("sessions"), f"^[12] open, 0 busy, {SESSIONS} at most$")

    def test_a_failed_check_and_a_good_root_would_be_seen(self):
        self.open()
        evidence = state()["evidence"] | {"is_for_development": False, "root": "tee", "verified": 1}
        evidence["checks"][1] |= {"ok": False, "got": "<b>another</b>"}
        self.driver.execute_script("clearTimeout(timer); showEvidence(arguments[0])", evidence)
        row = self.driver.find_elements("css selector", "#rows tr")[1]
        self.assertIn("FAILED measurement", row.text)
        self.assertIn("<b>another</b>", row.text)
        self.assertEqual(self.text("verdict"), f"1 of {len(evidence['checks'])} checks failed")
        self.assertFalse(self.find("development").is_displayed())

    def test_chat(self):
        """Piece by piece, to the end, with the reason and the usage that the API gives."""
        self.open()
        self.driver.execute_script("""
            window.lengths = new Set();
            new MutationObserver(() => lengths.add($("log").textContent.length))
                .observe($("log"), {childList: true, subtree: true});""")
        self.driver.execute_script("$('temperature').value = 0")
        answer, facts = self.ask(tokens="")
        messages = [{"role": "user", "content": QUESTION}]
        body = {"model": self.text("asset"), "messages": messages, "temperature": 0}
        whole = json.loads(request("POST", "/v1/chat/completions", token(), body)[2])
        self.assertIn(ZEN, answer)
        self.assertEqual(answer, whole["choices"][0]["message"]["content"].strip())
        usage = whole["usage"]
        tokens = f"{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out"
        self.assertRegex(facts, rf"^stop · {tokens} · [\d.]+ s$")
        self.assertGreater(self.driver.execute_script("return lengths.size"), 5)
        answer, facts = self.ask("<img src=x> <script>alert(1)</script> & more")
        self.assertIn("<img src=x> <script>alert(1)</script> & more", self.text("log"))
        self.assertEqual(self.driver.find_elements("css selector", "#log img, #log script"), [])
        turns = self.driver.execute_script("return turns.map(turn => turn.role)")
        self.assertEqual(turns, ["user", "assistant"] * 2)
        self.find("clear").click()
        self.assertEqual(self.text("log"), "")

    def test_a_failed_request_is_said(self):
        self.open()
        answer, facts = self.ask("zen " * 2000)
        self.assertIn("failed: the prompt does not fit into the model's context", facts)
        self.assertEqual(self.driver.execute_script("return turns"), [])
        self.complaints = 1
        self.assertIn(ZEN, self.ask(tokens=40)[0])

    def test_meter_and_lease(self):
        self.open()
        self.wait(lambda: "…" not in self.text("rate"))
        before = state()
        curve = self.driver.find_element("css selector", "#left-chart .curve")
        self.ask()
        after = state()
        self.assertGreater(after["meter"]["received"], before["meter"]["received"])
        self.assertLess(after["enclave"]["budget_left"], before["enclave"]["budget_left"])
        received = f"{after['meter']['received']:,} bytes since the proxy was started"
        self.wait(lambda: received in self.text("received"))
        left = after["enclave"]["budget_left"]
        self.wait(lambda: self.text("left") == f"{left:,} bytes")
        self.assertTrue(
            self.text("share").startswith(f"{left / after['enclave']['budget']:.1%}"[:-1])
        )
        self.assertFalse(self.find("low").is_displayed())
        peak = int(re.sub("[^0-9]", "", self.text("rate-top")))
        self.assertGreater(peak, 0)
        self.assertIn(f"{after['meter']['rate']:,} bytes/s", self.text("rate-limit"))
        self.assertGreaterEqual(curve.get_attribute("d").count("M"), 3)
        self.wait(lambda: self.text("rate") == "0 bytes/s")

    def test_budget_that_is_nearly_spent(self):
        """Said once it is less than a tenth, and no longer once more was granted."""
        self.open()
        self.wait(lambda: self.text("left"))
        script = "clearTimeout(timer); showLease(0, arguments[0], 1000)"
        for left, is_low in ((100, False), (99, True), (0, True), (1000, False)):
            self.driver.execute_script(script, left)
            self.assertEqual(self.find("low").is_displayed(), is_low)
            self.assertEqual("Less than a tenth of the budget" in self.text("low"), is_low)
        self.assertEqual(self.text("share"), "100.0 % of the budget")

    def test_stop(self):
        """In the middle of an answer: what came stays, the enclave is free, a new one comes."""
        self.open()
        self.driver.execute_script("""
            $("temperature").value = 2, $("seed").value = 1;
            new MutationObserver((_, observer) => {
                if (!$("log").querySelectorAll("p")[2]?.textContent) return;
                observer.disconnect();
                $("stop").click();
            }).observe($("log"), {childList: true, subtree: true});""")
        answer, facts = self.ask(tokens="")
        self.assertTrue(answer)
        self.assertRegex(facts, r"^stopped by you · [\d.]+ s$")
        until(lambda: not metrics()["requests_running"])
        self.assertEqual(self.driver.switch_to.active_element, self.find("prompt"))
        self.driver.execute_script("$('temperature').value = 0")
        self.assertTrue(self.ask()[1].startswith("length · "))

    def test_wrong_token(self):
        self.press("mu-" + "0" * 64, self.key("ENTER"))
        self.wait(lambda: self.text("refusal"))
        self.assertEqual(self.text("refusal"), "Not opened: the token was refused.")
        self.assertFalse(self.find("console").is_displayed())
        self.assertEqual(self.driver.find_elements("css selector", "#rows tr"), [])
        self.assertEqual(self.driver.switch_to.active_element, self.find("token"))
        self.open()
        self.assertEqual(self.text("refusal"), "")
        self.complaints = 1

    def test_token_is_in_the_pages_memory_only(self):
        self.open()
        self.wait(lambda: self.text("left"))
        script = """return [document.documentElement.outerHTML, document.cookie, location.href,
            JSON.stringify([localStorage, sessionStorage, history.state]),
            $("token").value].join()"""
        self.assertNotIn(token(), self.driver.execute_script(script))
        self.assertEqual(self.driver.execute_script("return token"), token())
        self.find("forget").click()
        self.wait(lambda: self.driver.execute_script("return token") == "")
        self.assertTrue(self.find("enter").is_displayed())
        self.assertFalse(self.find("console").is_displayed())

    def test_policy_is_enforced(self):
        from selenium.common.exceptions import JavascriptException

        with self.assertRaisesRegex(JavascriptException, "TrustedHTML"):
            self.driver.execute_script("document.body.innerHTML = '<b>x</b>'")
        blocked = self.driver.execute_async_script("""
            const done = arguments[0], found = [];
            document.addEventListener("securitypolicyviolation", event => {
                if (found.push(event.effectiveDirective) === 3) done(found.sort());
            });
            fetch("http://127.0.0.2:9/").catch(() => {});
            const image = new Image(), style = document.createElement("style");
            image.src = "http://127.0.0.2:9/";
            style.textContent = "body { display: none }";
            document.body.append(style);""")
        self.assertEqual(blocked, ["connect-src", "img-src", "style-src-elem"])
        browser.complaints(self.driver), browser.requested(self.driver)  # of this test's own
        self.driver.refresh()

    def test_phone(self):
        self.assertEqual(browser.overflow(self.driver), 0)
        self.open()
        self.ask("x" * 500)
        self.driver.find_element("css selector", "summary").click()
        self.assertEqual(browser.overflow(self.driver), 0)
        self.assertEqual(self.driver.execute_script("return innerWidth"), 360)
        self.assertGreater(self.find("prompt").size["width"], 250)

    def test_light_and_dark(self):
        for scheme in ("light", "dark"):
            browser.prefer(self.driver, color_scheme=scheme)
            self.driver.refresh()
            ratios = browser.contrasts(self.driver)
            self.assertIn("Access token", ratios)
            self.open()
            self.ask()
            self.driver.find_element("css selector", "summary").click()
            ratios |= browser.contrasts(self.driver)
            self.assertGreater(len(ratios), 40)
            least = min(ratios, key=ratios.get)
            self.assertGreaterEqual(ratios[least], browser.LEAST_CONTRAST, (scheme, least))
            colours = self.driver.execute_script("""
                const style = getComputedStyle(document.body);
                return [style.color, style.backgroundColor].map(
                    text => text.match(/\\d+/g).reduce((sum, part) => sum + Number(part), 0))""")
            self.assertEqual(colours[0] > colours[1], scheme == "dark")

    def test_nothing_moves(self):
        browser.prefer(self.driver, reduced_motion="reduce")
        self.open()
        self.ask()
        moving = self.driver.execute_script("""
            const moves = [...document.querySelectorAll("*")].map(getComputedStyle).filter(style =>
                style.animationName !== "none" || style.transitionDuration !== "0s"
                || style.scrollBehavior === "smooth");
            return moves.length + document.getAnimations().length""")
        self.assertEqual(moving, 0)

    def test_by_keyboard_alone(self):
        """Token, question, answer, Esc; Tab reaches all in reading order and shows where it is."""
        tab, enter = self.key("TAB"), self.key("ENTER")
        self.assertEqual(self.driver.switch_to.active_element, self.find("token"))
        self.press(token(), tab)
        self.assertEqual(self.driver.switch_to.active_element.text, "Open")
        self.press(enter)
        self.wait(lambda: self.driver.switch_to.active_element == self.find("prompt"))
        self.press("one", self.key("SHIFT"), enter, self.key("NULL"))
        self.assertFalse(self.find("stop").is_enabled())
        self.assertEqual(self.find("prompt").get_attribute("value"), "one\n")
        self.press(self.key("BACKSPACE") * 4, QUESTION, tab)
        self.assertEqual(self.driver.switch_to.active_element, self.find("send"))
        self.press(enter)
        self.wait(lambda: self.entries() and not self.find("stop").is_enabled())
        self.assertIn(ZEN, self.ending()[0])
        with engine_held():
            self.press(QUESTION, enter)
            self.wait(lambda: self.find("stop").is_enabled())
            self.press(self.key("ESCAPE"))
            self.wait(lambda: "stopped by you" in self.ending()[1])
        seen = []
        for _ in range(30):
            self.press(tab)
            element = self.driver.switch_to.active_element
            if element.tag_name == "body" or element.id in [one.id for one, _ in seen]:
                break
            outline = element.value_of_css_property("outline-style")
            seen.append((element, (element.accessible_name, outline != "none")))
            if element.tag_name == "summary":
                self.press(enter)
        names = [name for _, (name, _) in seen]
        self.assertTrue(all(is_shown for _, (_, is_shown) in seen), seen)
        order = ["Send", "Clear", "Options", "Temperature", "Tokens at most", "Seed"]
        self.assertEqual(names[: len(order)], order)

    def test_what_a_screen_reader_finds(self):
        self.open()
        self.ask()
        self.assertEqual(self.find("log").get_attribute("aria-live"), "polite")
        self.assertEqual(self.find("log").aria_role, "log")
        for element in self.driver.find_elements("css selector", "input, textarea, button, svg"):
            if element.is_displayed():
                self.assertTrue(element.accessible_name, element.get_attribute("outerHTML"))
        for chart in ("rate-chart", "left-chart"):
            self.assertIn(self.find(chart).aria_role, ("image", "img"))
        for section in self.driver.find_elements("css selector", "section"):
            self.assertEqual((section.aria_role, bool(section.accessible_name)), ("region", True))

    def test_revoked_locked_and_unlocked_again(self):
        other = muproxy.read_token(site.other)
        self.open(other)
        with owner() as session:
            session.command({"revoke": mp.token_hash(other)})
        self.wait(lambda: self.text("refusal"))
        self.assertEqual(self.text("refusal"), "Not opened: the token was refused.")
        self.assertFalse(self.find("console").is_displayed())
        self.open()
        with owner() as session:
            session.command({"lock": True})
        self.wait(lambda: self.find("trouble").is_displayed())
        locked = "the enclave is locked: the owner has to unlock it"
        self.wait(lambda: self.find("retry").click() or locked in self.text("trouble"))
        self.assertEqual(self.text("verdict"), "")
        self.driver.refresh()
        self.press(token(), self.key("ENTER"))
        self.wait(lambda: self.text("refusal"))
        self.assertEqual(self.text("refusal"), f"Not opened: {locked}.")
        unlock()
        self.open()
        self.assertIn(ZEN, self.ask(tokens=40)[0])
        said = browser.complaints(self.driver)
        self.assertEqual([line for line in said if "Failed to load resource" not in line], [])


if __name__ == "__main__":
    unittest.main()
