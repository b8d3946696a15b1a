"""tools/report.py: the README's tables are those of the measured files; one page shows it all."""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

from tests import browser, support, test_project

sys.path.insert(0, str(support.TOOLS))

import report  # noqa: E402

REPORT = [sys.executable, str(support.TOOLS / "report.py")]
KINDS = {"hardware", "people", "site", "software", "later"}


def run(*arguments):
    """A run of the tool."""
    command = [*REPORT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


class Readme(unittest.TestCase):
    """What the README shows is what was measured."""

    def test_tables_are_those_of_the_measured_files(self):
        done = run("--readme", "--check")
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_another_figure_is_found(self):
        documents = report.read_documents(sorted(report.MEASURED.glob("*.json")))
        documents["bench"]["boot"]["seconds"]["image"] = [1234.5]
        text = report.README.read_text("utf-8")
        made = report.render(text, documents)
        self.assertNotEqual(made, text)
        self.assertIn("1234.5 s", made)

    def test_every_document_is_in_a_section(self):
        documents = report.read_documents(sorted(report.MEASURED.glob("*.json")))
        self.assertEqual(set(documents), set(report.SECTIONS))


class Controls(unittest.TestCase):
    """The map of controls: its tests exist, and what is missing is said."""

    def setUp(self):
        self.values = report.controls()

    def test_every_test_exists(self):
        for row in self.values["controls"]:
            for name in row["tests"]:
                self.assertEqual(name.count("."), 3, name)
                self.assertTrue(test_project.find_test(name), name)

    def test_rows_are_complete(self):
        for row in self.values["controls"]:
            with self.subTest(control=row["control"], title=row["title"]):
                self.assertIn(row["source"], self.values["sources"])
                self.assertEqual(bool(row["mechanism"]), bool(row["tests"]))
                self.assertTrue(row["mechanism"] or row["missing"])
                self.assertIn(row["kind"], KINDS if row["missing"] else {""})

    def test_nothing_is_said_to_be_certified(self):
        texts = [report.README.read_text("utf-8"), report.CONTROLS.read_text("utf-8")]
        for text in texts:
            self.assertIsNone(re.search(r"SL5.{0,20}(certified|compliant)", text, re.IGNORECASE))
            self.assertRegex(text, r"(?s)controls.{0,60}in software, as a\s+prototype")


class Page(unittest.TestCase):
    """The page, in a browser."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.path = pathlib.Path(folder.name, "report.html")
        done = run("--output", cls.path)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        cls.text = cls.path.read_text("utf-8")

    def test_it_loads_nothing(self):
        links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s)>]+)""", self.text)
        self.assertEqual([link for link in links if link[0] != "#" and link != "data:,"], [])
        self.assertNotIn("<script", self.text)

    def test_every_part_is_there(self):
        titles = re.findall(r"<h2[^>]*>([^<]+)</h2>", self.text)
        self.assertEqual(len(titles), len(report.SECTIONS) + 2)
        self.assertIn("0 of 0", report.claims_section([])[1])  # it counts
        for row in report.claims(report.README.read_text("utf-8")):
            self.assertIn(f">{row[0]}<", self.text)

    @unittest.skipIf(browser.MISSING, f"not installed: {' '.join(browser.MISSING)}")
    def test_in_a_browser(self):
        with browser.open_browser() as driver:
            driver.get(self.path.as_uri())
            self.assertLessEqual(browser.overflow(driver, 360), 0)
            for scheme in ("light", "dark"):
                browser.prefer(driver, color_scheme=scheme)
                texts = browser.contrasts(driver)
                self.assertGreater(len(texts), 100)
                worst = min(texts, key=texts.get)
                self.assertGreaterEqual(texts[worst], browser.LEAST_CONTRAST, worst)
            self.assertEqual(browser.complaints(driver), [])
            self.assertEqual(browser.requested(driver), set())


class Mistakes(unittest.TestCase):
    """One line says what is wrong."""

    def test_each_in_its_own_words(self):
        with tempfile.TemporaryDirectory() as folder:
            output = pathlib.Path(folder, "report.html")
            cases = {
                "absent": (None, "can't read"),
                "text": ("no JSON", "is not JSON"),
                "list": ("[]", "is of none of these"),
                "other": ('{"tool": "bench", "version": 7}', "has version 7"),
            }
            for name, (text, said) in cases.items():
                path = pathlib.Path(folder, name)
                if text is not None:
                    path.write_text(text)
                done = run(path, "--output", output)
                self.assertEqual((done.returncode, done.stdout), (1, ""), name)
                self.assertRegex(done.stderr, rf"\Areport: error: [^\n]*{said}[^\n]*\n\Z")
                self.assertFalse(output.exists())

    def test_a_document_without_its_figures(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "bench.json")
            path.write_text(json.dumps({"tool": "bench", "version": 1}))
            done = run(path, "--output", path.with_suffix(".html"))
            self.assertEqual(done.returncode, 1)
            said = "the document of bench is not whole"
            self.assertRegex(done.stderr, rf"\Areport: error: {said}[^\n]*\n\Z")

    def test_no_place_to_write(self):
        done = run("--output", "/nowhere/report.html")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"\Areport: error: can't write /nowhere[^\n]*\n\Z")
        self.assertEqual(run().returncode, 2)


if __name__ == "__main__":
    unittest.main()
