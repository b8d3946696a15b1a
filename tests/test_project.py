"""The project's promises about itself: size, imports, layout, style, and the README's claims."""

import ast
import fnmatch
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

import muprotocol as mp

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from loc import PRODUCT, code_lines, engine_lines, trusted_lines  # noqa: E402

BUDGETS = {"muprotocol.py": 600, "muenclave.py": 1000, "muproxy.py": 1100}  # code lines
ENGINE_BUDGET = 400
LONGEST_LINE = 100
OLDEST_PYTHON = (3, 10)
TOP_LEVEL = {".ci", ".gitignore", "LICENSE", "README.md", "muenclave.py", "muprotocol.py"}
TOP_LEVEL |= {"muproxy.py", "pyproject.toml", "setup.cfg", "tests", "tools"}
LATER = {"br_external"}  # may be there
STATUSES = ("held", "pending")


def source(name):
    """The text of a file of the project."""
    return (ROOT / name).read_text("utf-8")


def python_files():
    """Every Python file of the project, as paths from its root."""
    names = ("br_external", "tests", "tools")
    folders = (ROOT.glob("*.py"), *((ROOT / name).rglob("*.py") for name in names))
    paths = sorted(path for found in folders for path in found)
    return [path.relative_to(ROOT).as_posix() for path in paths]


class Size(unittest.TestCase):
    """What has to be trusted stays small."""

    def test_code_lines(self):
        for name, budget in BUDGETS.items():
            with self.subTest(module=name):
                self.assertLessEqual(len(code_lines(source(name))), budget)

    def test_engine_code_lines(self):
        text = source("muenclave.py")
        engine = code_lines(text) & engine_lines(text)
        self.assertGreater(len(engine), 100)
        self.assertLessEqual(len(engine), ENGINE_BUDGET)

    def test_readme_says_how_many_lines_the_bound_rests_on(self):
        trusted = trusted_lines()
        stated = re.search(r"the bound rests on\W+([\d,]+) (?:code )?lines", source("README.md"))
        self.assertIsNotNone(stated, f"the README is to say: the bound rests on {trusted:,} lines")
        self.assertEqual(int(stated[1].replace(",", "")), trusted)

    def test_line_length(self):
        for name in python_files():
            for number, row in enumerate(source(name).splitlines(), 1):
                self.assertLessEqual(len(row), LONGEST_LINE, f"{name}:{number}")

    def test_the_count_itself(self):
        text = (
            '"""A.\n\nB."""\n\nimport os  # why\n\n\ndef f():\n    """C."""\n    x = """\n\n"""\n'
        )
        text += "    return (\n        # no\n        os, x)\n\n# ==== engine\n\ny = 1\n"
        self.assertEqual(code_lines(text), {5, 8, 10, 11, 12, 13, 15, 19})
        self.assertEqual(engine_lines(text), {17, 18, 19})
        self.assertEqual(engine_lines(text + "# ==== command line\nz = 1\n"), {17, 18, 19})


class Imports(unittest.TestCase):
    """The product stands on the standard library; of cryptography it takes AES-GCM, and late."""

    ALLOWED_LATER = {"cryptography", "torch", "transformers", "tokenizers", "accelerate", "jinja2"}
    CRYPTOGRAPHY = {"cryptography.hazmat.primitives.ciphers.aead", "cryptography.exceptions"}

    def test_module_level_is_standard_library(self):
        known = sys.stdlib_module_names | {name.removesuffix(".py") for name in PRODUCT}
        for name in PRODUCT:
            tree = ast.parse(source(name))
            inside = {node for function in functions(tree) for node in ast.walk(function)}
            for node in imports(tree):
                modules = {module.partition(".")[0] for module in imported(node)}
                allowed = known | (self.ALLOWED_LATER if node in inside else set())
                self.assertLessEqual(modules, allowed, f"{name}:{node.lineno}")

    def test_of_cryptography_only_aes_gcm(self):
        for name in PRODUCT:
            for node in imports(ast.parse(source(name))):
                taken = {module for module in imported(node) if module.startswith("cryptography")}
                self.assertLessEqual(taken, self.CRYPTOGRAPHY, f"{name}:{node.lineno}")

    def test_first_tools_run_without_a_package(self):
        for name in ("test", "quickstart", "environment", "image", "vm"):
            alone = f"import sys; sys.path.insert(0, sys.argv[1]); import {name}"
            command = [sys.executable, "-I", "-S", "-B", "-c", alone, str(ROOT / "tools")]
            done = subprocess.run(command, capture_output=True, text=True, cwd="/")
            self.assertEqual((done.returncode, done.stderr), (0, ""), name)

    def test_proxy_needs_nothing_of_the_guest(self):
        for name in ("muprotocol.py", "muproxy.py"):
            modules = {
                module for node in imports(ast.parse(source(name))) for module in imported(node)
            }
            self.assertNotIn("muenclave", modules, name)
        alone = "import sys; sys.path.insert(0, sys.argv[1]); import muprotocol, muproxy, muenclave"
        command = [sys.executable, "-I", "-S", "-c", alone, str(ROOT)]  # no site-packages at all
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        self.assertEqual((done.returncode, done.stderr), (0, ""))


def functions(tree):
    """The functions in a tree."""
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def imports(tree):
    """The import statements in a tree."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported(node):
    """The full names of the modules that an import statement names."""
    if isinstance(node, ast.ImportFrom):
        return [node.module or "."]
    return [alias.name for alias in node.names]


class Source(unittest.TestCase):
    """What the code may not contain, and what every file of it must satisfy."""

    FORBIDDEN = ("trust_remote_code", "pickle", "torch.load", "insecure-plaintext", "shell=True")
    FORBIDDEN += ("eval(", "exec(", "os.system")

    def test_forbidden_words(self):
        for name in PRODUCT:
            for word in self.FORBIDDEN:
                found = re.search(rf"(?<![\w.]){re.escape(word)}", source(name))
                self.assertIsNone(found, f"{name}: {word}")

    def test_oldest_python_parses_it(self):
        for name in python_files():
            ast.parse(source(name), name, feature_version=OLDEST_PYTHON)

    def test_public_names_are_documented(self):
        for name in PRODUCT:
            tree = ast.parse(source(name))
            kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            for node in (tree, *(n for n in tree.body if isinstance(n, kinds))):
                is_public = not getattr(node, "name", "").startswith("_")
                if is_public:
                    self.assertTrue(ast.get_docstring(node), getattr(node, "name", name))

    def test_ruff(self):
        options = ["--config", ROOT / ".ci" / "ruff.toml", "--no-cache"]
        for command in (["check", *options], ["format", *options, "--check"]):
            ruff = [sys.executable, "-m", "ruff", *command, "."]
            done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_no_typing_of_secrets_on_the_command_line(self):
        """Keys, tokens and secrets come from files or the environment: never from argv."""
        for name in (*PRODUCT, "tools/owner.py"):
            flags = set(re.findall(r'"(--[a-z-]+)"', source(name)))
            self.assertEqual(flags & {"--token", "--password", "--passphrase", "--secret"}, set())


class Layout(unittest.TestCase):
    """The top level is as designed."""

    def test_top_level(self):
        ignored = [row.strip("/") for row in source(".gitignore").split()]
        found = {
            name
            for name in os.listdir(ROOT)
            if not any(fnmatch.fnmatch(name, pattern) for pattern in (".git", *ignored))
        }
        self.assertEqual(found - LATER, TOP_LEVEL)

    def test_torch_is_one_version(self):
        lines = [row.strip() for row in source("setup.cfg").splitlines()]
        self.assertIn("torch==2.13.0", lines)
        self.assertEqual(sum(row.startswith("torch") for row in lines), 1)

    def test_package_names_the_three_modules(self):
        modules = ", ".join(name.removesuffix(".py") for name in PRODUCT)
        self.assertIn(f"py_modules = {modules}", source("setup.cfg").splitlines())
        self.assertNotIn("[project]", source("pyproject.toml"))


def claims(text):
    """The rows of the claims table in a Markdown text, as lists of cells without marks."""
    rows = re.findall(r"^\|\s*(C\d+)\s*\|(.*)\|\s*$", text, re.MULTILINE)
    return [[number, *(cell.strip() for cell in rest.split("|"))] for number, rest in rows]


def find_test(name):
    """Whether tests.module.Class.test_method, or a part of that from the left, exists."""
    package, module, *rest = name.split(".")
    path = ROOT / package / f"{module}.py"
    if not path.exists():
        return False
    body = ast.parse(path.read_text("utf-8")).body
    for part in rest:
        nodes = [node for node in body if getattr(node, "name", None) == part]
        if not nodes:
            return False
        body = nodes[0].body
    return True


class Claims(unittest.TestCase):
    """The README's claims table: each row is complete, and its tests exist."""

    def check(self, rows):
        """What is wrong with rows of a claims table, as lines."""
        wrong = []
        for row in rows:
            if len(row) != 5 or row[4] not in STATUSES or not all(row[:3]):
                wrong.append(f"{row[0]}: five cells are due, the last one of {STATUSES}")
                continue
            tests = re.findall(r"tests\.[\w.]*\w", row[3])
            wrong += [f"{row[0]}: no such test: {name}" for name in tests if not find_test(name)]
            whole = [name for name in tests if name.count(".") == 3]
            if row[4] == "held" and not whole:
                wrong.append(f"{row[0]}: held, but by no test")
        numbers = [row[0] for row in rows]
        return wrong + [f"{n}: twice" for n in sorted(set(numbers)) if numbers.count(n) > 1]

    def test_readme(self):
        rows = claims(source("README.md"))
        self.assertGreater(len(rows), 5)
        self.assertEqual(self.check(rows), [])

    def test_the_check_itself(self):
        here = "tests.test_project.Claims.test_readme"
        good = f"| C1 | it holds | by this | `{here}` | held |\n| C2 | later | x | | pending |\n"
        self.assertEqual(self.check(claims(good)), [])
        bad = (
            good.replace("test_readme", "test_nothing"),
            good.replace("Claims", "Nothing"),
            good.replace("test_project", "test_nothing"),
            good.replace(here, ""),
            good.replace(here, "tests.test_project"),
            good.replace("pending", "perhaps"),
            good.replace("C2", "C1"),
            good.replace("| by this ", ""),
            good.replace("it holds", " "),
        )
        for text in bad:
            self.assertEqual(len(self.check(claims(text))), 1, text)


class Runner(unittest.TestCase):
    """`python -m tests`: it counts right, and a skip in CI is a failure."""

    SUITE = """
import unittest
class T(unittest.TestCase):
    def test_pass(self): pass
    def test_fail(self): self.fail()
    def test_error(self): 1 / 0
    def test_subtests(self):
        for i in range(3):
            with self.subTest(i=i): self.assertEqual(i, 0)
    @unittest.skip("needs a GPU")
    def test_gpu(self): pass
    @unittest.skip("strace is not installed")
    def test_strace(self): pass
    @unittest.expectedFailure
    def test_expected(self): pass
@unittest.skip("strace is not installed")
class U(unittest.TestCase):
    def test_one(self): pass
class V(unittest.TestCase):
    @classmethod
    def setUpClass(cls): raise OSError
    def test_one(self): pass
"""

    def run_suite(self, names, **environment):
        """(exit status, last line) of a run of SUITE."""
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "sample.py").write_text(self.SUITE)
            clean = {key: value for key, value in os.environ.items() if key != "CI"}
            paths = os.pathsep.join([folder, str(ROOT)])
            done = subprocess.run(
                [sys.executable, "-B", "-m", "tests", *names],
                env=clean | {"PYTHONPATH": paths} | environment,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        return done.returncode, done.stdout.splitlines()[-1]

    def test_counts(self):
        self.assertEqual(self.run_suite(["sample"]), (1, "1 passed, 5 failed, 3 skipped"))

    def test_skip_in_ci(self):
        self.assertEqual(self.run_suite(["sample.T.test_gpu"], CI="true")[0], 0)
        self.assertEqual(
            self.run_suite(["sample.T.test_strace"], CI="true"),
            (1, "0 passed, 1 failed, 0 skipped"),
        )
        self.assertEqual(
            self.run_suite(["sample.U"], CI="true"), (1, "0 passed, 1 failed, 0 skipped")
        )
        self.assertEqual(self.run_suite(["sample.U"]), (0, "0 passed, 0 failed, 1 skipped"))

    def test_nothing_found_is_a_failure(self):
        found = self.run_suite(["sample", "-k", "no_such_test"])
        self.assertEqual(found, (1, "0 passed, 0 failed, 0 skipped"))


class Measure(unittest.TestCase):
    """tools/measure.py, as an owner runs it."""

    def measure(self, *arguments):
        command = [sys.executable, ROOT / "tools" / "measure.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd="/")

    def test_local(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "reference.json")
            self.assertEqual(self.measure("--output", path).returncode, 0)
            values = json.loads(path.read_text())
            manifest = json.loads(self.measure("--manifest").stdout)
            self.assertEqual(os.listdir(folder), ["reference.json"])
        self.assertEqual(values["measurement"], mp.manifest_digest(manifest))
        self.assertEqual((values["kind"], values["root"], values["withdrawn"]), ("psk", "psk", []))
        self.assertEqual(set(manifest["files"]), {"muenclave.py", "muprotocol.py"})

    def test_measuring_anew_keeps_what_was_withdrawn(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "reference.json")
            path.write_text(json.dumps({"withdrawn": ["ab" * 32]}))
            self.assertEqual(self.measure("--output", path).returncode, 0)
            self.assertEqual(json.loads(path.read_text())["withdrawn"], ["ab" * 32])

    def test_root_file_system(self):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder, "root")
            (root / "bin").mkdir(parents=True)
            (root / "bin" / "a").write_text("a")
            (root / "bin" / "b").symlink_to("a")
            guest = ("--root", root, "--kernel", "6.1.0", "--command-line", "quiet")
            measurements = [self.measurement(*guest)]
            self.assertEqual(self.measurement(*guest), measurements[0])
            measurements.append(self.measurement(*guest[:-1], "quiet x"))
            measurements.append(self.measurement(*guest[:3], "6.1.1", *guest[4:]))
            (root / "bin" / "a").chmod(0o755)
            measurements.append(self.measurement(*guest))
            (root / "bin" / "a").write_text("b")
            measurements.append(self.measurement(*guest))
            (root / "bin" / "b").unlink()
            (root / "bin" / "b").symlink_to("c")
            measurements.append(self.measurement(*guest))
            (root / "bin" / "a").rename(root / "a")
            measurements.append(self.measurement(*guest))
        self.assertEqual(len(set(measurements)), len(measurements))

    def measurement(self, *arguments):
        return json.loads(self.measure(*arguments).stdout)["measurement"]

    def test_mistakes_are_one_line(self):
        with tempfile.TemporaryDirectory() as folder:
            other = pathlib.Path(folder, "notes.txt")
            other.write_text("not reference values")
            absent, empty = pathlib.Path(folder, "absent"), pathlib.Path(folder, "empty")
            empty.mkdir()
            guest = ("--kernel", "6.1", "--command-line", "")
            for arguments in (
                ("--python", absent / "python"),
                ("--python", "/bin/false"),
                ("--root", absent, *guest),
                ("--root", empty, *guest),
                ("--output", other),
                ("--output", absent / "reference.json"),
            ):
                done = self.measure(*arguments)
                self.assertEqual((done.returncode, done.stdout), (1, ""), arguments)
                self.assertRegex(done.stderr, r"\Ameasure: error: [^\n]+\n\Z")
            self.assertEqual(other.read_text(), "not reference values")


if __name__ == "__main__":
    unittest.main()
