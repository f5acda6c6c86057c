"""What the package promises as a whole: a light import, the import contract, and documents that say what is true."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import longscan
from longscan import errors, ops
from longscan.cli import COMMANDS
from longscan.ops import backends

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "longscan"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

#: Imported by the parts that use them, never by `import longscan` alone.
HEAVY = {
    "numba",
    "triton",
    "matplotlib",
    "tensorboard",
    "transformers",
    "tokenizers",
    "datasets",
    "lm_eval",
    "onnx",
    "tyro",
    "rich",
    "safetensors",
}


def in_fresh_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def test_import_adds_little_to_torch() -> None:
    # Time of this process's own processor: other work on the machine does not count. The best of three.
    code = "import torch, time; s = time.process_time(); import longscan; print(time.process_time() - s)"
    assert min(float(in_fresh_python(code)) for _ in range(3)) < 0.3


@pytest.mark.parametrize("line", ["import longscan", "import longscan; longscan.LanguageModel, longscan.Mamba"])
def test_import_leaves_heavy_packages_alone(line: str) -> None:
    code = f"import sys, torch; before = set(sys.modules); {line}; print(*(set(sys.modules) - before))"
    loaded = {name.partition(".")[0] for name in in_fresh_python(code).split()}
    assert loaded & HEAVY == set()


def test_every_module_imports() -> None:
    for module in pkgutil.walk_packages(longscan.__path__, "longscan."):
        if module.name.rpartition(".")[2] == "triton" or ".triton_" in module.name:
            continue  # where there is no Triton, the backend is refused instead
        importlib.import_module(module.name)


def test_every_public_name_exists() -> None:
    assert set(longscan.__all__) <= set(dir(longscan))
    for name in longscan.__all__:
        assert getattr(longscan, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'mambo'"):
        longscan.mambo  # noqa: B018 (the attribute is what is tested)


def test_submodules_come_when_they_are_named() -> None:
    code = "import longscan; print(longscan.ops.selective_scan.__name__, longscan.statespace.__name__)"
    assert in_fresh_python(code).split() == ["selective_scan", "longscan.statespace"]
    # All but the command line: importing that is for its script alone.
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")} | {"errors"}
    assert folders - {"cli"} == set(dir(longscan)) - set(longscan.__all__)


def test_public_functions_are_documented() -> None:
    for name in longscan.__all__:
        if name != "__version__":
            assert len(getattr(longscan, name).__doc__ or "") > 40, name
    for name in ops.__all__:
        assert len(getattr(ops, name).__doc__ or "") > 40, name


def test_every_public_name_is_in_the_api() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    raised = [name for name, value in vars(errors).items() if isinstance(value, type)]
    for name in [*longscan.__all__, *ops.__all__, *raised]:
        assert f"`{name}" in text or name == "__version__", f"docs/api.md says nothing of {name}"


def test_version_is_the_distribution_s() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{longscan.__version__}"' in text
    assert f"## {longscan.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_import_contract_is_kept() -> None:
    linter = pytest.importorskip("importlinter.cli")
    result = subprocess.run(
        [sys.executable, "-c", f"import {linter.__name__} as cli; cli.lint_imports_command()", "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout


def test_every_operator_is_in_the_contract() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    operators = {path.parent.name for path in (SOURCE / "ops").glob("*/__init__.py")}
    for operator in operators | backends.OPERATORS.keys():
        assert f'"longscan.ops.{operator}"' in text, f"{operator} is missing from the import contract in pyproject.toml"


def test_the_library_never_prints() -> None:
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path.relative_to(ROOT)}:{node.lineno}"


def test_a_source_archive_holds_what_is_tracked() -> None:
    named = (ROOT / "MANIFEST.in").read_text().split()
    implied = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "src"}
    tracked = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert {name for name in tracked if not name.startswith(".")} - implied - set(named) == set()


def test_licence_is_the_whole_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert [f"{i}. " in text for i in range(1, 10)] == [True] * 9


def tracked_files() -> list[Path]:
    """Every file under version control, or, in a source archive, every file that would be."""
    listing = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if listing.returncode == 0:
        return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and not {".venv", "runs"} & set(path.parts)]


def test_nothing_depends_on_one_machine() -> None:
    # Package indexes are pip's business, and no file may name a folder of the machine it was written on.
    index = re.compile(r"--(?:extra-)?index-url|--find-links|https?://[\w.-]*(?:pypi|pythonhosted|whl\.)[\w.-]*")
    folder = re.compile(r"(?<![\w./~$}>-])/(?:home|root|work|opt|mnt|Users)/\w")
    for path in tracked_files():
        if path == Path(__file__).resolve() or path.suffix in {".png", ".safetensors"}:
            continue
        text = path.read_text(encoding="utf-8")
        assert index.search(text) is None, f"{path.relative_to(ROOT)}: {index.search(text)}"
        assert folder.search(text) is None, f"{path.relative_to(ROOT)}: {folder.search(text)}"


def links() -> Iterator[tuple[Path, str]]:
    for document in DOCUMENTS:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            yield document, target


def anchors(document: Path) -> set[str]:
    """The names that headings get as link targets."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for document, target in links():
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{document.relative_to(ROOT)}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{document.relative_to(ROOT)}: {target}"


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a document in turn, as a reader would type them into one session."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    session: dict[str, object] = {"__name__": "session"}
    for code in blocks(document, "python"):
        exec(compile(code, str(document), "exec"), session)


def test_commands_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in DOCUMENTS:
        text = re.sub(r"^```(?!sh\n).*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        code = [*blocks(document, "sh"), *re.findall(r"(?<!`)`([^`\n]+)`", text)]
        for command in re.findall(r"^longscan ([a-z]+)", "\n".join(code), flags=re.MULTILINE):
            assert command in COMMANDS, f"{document.relative_to(ROOT)}: longscan {command}"
        for target in re.findall(r"^make ([a-z]+)", "\n".join(code), flags=re.MULTILINE):
            assert target in targets, f"{document.relative_to(ROOT)}: make {target}"


def test_environment_variables_are_in_the_guide() -> None:
    read = {name for path in SOURCE.rglob("*.py") for name in re.findall(r"LONGSCAN_[A-Z_]+", path.read_text())}
    guide = (ROOT / "docs" / "guide.md").read_text()
    assert {name for name in read if name not in guide} == set()


def test_backends_named_in_documents_exist() -> None:
    for document in DOCUMENTS:
        for name in re.findall(r"LONGSCAN_BACKEND=(\w+)", document.read_text(encoding="utf-8")):
            assert name in backends.NAMES, f"{document.relative_to(ROOT)}: {name}"
