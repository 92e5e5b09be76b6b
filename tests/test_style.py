"""STYLE in the form of checks: one order, one width, no flag that nothing reads, copies alike."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(p for p in ROOT.glob("*.py") if p.name != "common.py")
LONG = {"va_vae.py", "rae.py", "vjepa_guidance.py", "moe_subspace.py"}  # two networks each
CEILING = {p.name: 600 if p.name in LONG else 500 for p in SCRIPTS} | {"common.py": 538}
FLAGS = """preset out fresh seed device precision compile data image_size flip skip_bad batch_size
steps lr ema_decay grad_clip log_every save_every sample_every encoder sample n npz""".split()
OTHERS = {}  # definitions that share a name and differ: {name: why}
READ_BY_COMMON = {"preset"}  # parse_config reads it from the command line, not from cfg


def ruler(word):
    return f"# ---- {word} ".ljust(90, "-")


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")]), ids=lambda p: p.name
)
def test_lines_are_at_most_100_characters(path):
    long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not long


@pytest.mark.parametrize("name", CEILING)
def test_file_fits_its_ceiling(name):
    assert len((ROOT / name).read_text().splitlines()) <= CEILING[name]


def test_common_names_no_paper():
    assert not re.search(
        r"arXiv|\bEq\. |\bTab\. |\bSec\. |diffusion", (ROOT / "common.py").read_text()
    )


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "common.py"], ids=lambda p: p.stem)
def test_public_definitions_have_a_docstring(path):
    tree = ast.parse(path.read_text())
    bare = [
        n.name
        for n in tree.body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef))
        and not ast.get_docstring(n)
        and n.name not in ("main", "train", "Config")
    ]
    assert not bare


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_script_has_the_five_parts_in_order_and_a_map_to_its_paper(path):
    text = path.read_text()
    parts = [
        text.find("\n" + ruler(word) + "\n")
        for word in ("config", "data", "model", "method", "train")
    ]
    assert -1 not in parts and parts == sorted(parts)
    doc = ast.get_docstring(ast.parse(text))
    assert re.search(r"arXiv:\d{4}\.\d{5}v\d", doc)
    for word in ("Paper", "Here", "Changed", "Left out", "Notation", "Run"):
        assert re.search(f"^{word}  ", doc, re.M), word
    assert text.rstrip().endswith('if __name__ == "__main__":\n    main()')
    assert "import *" not in text and not re.search(r"^\s*global ", text, re.M)
    others = {p.stem for p in SCRIPTS} - {path.stem}
    assert not re.search(rf"^(from|import) ({'|'.join(others) or 'none'})\b", text, re.M)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_flag_is_read_and_the_shared_ones_come_first_in_order(path):
    module, text = importlib.import_module(path.stem), path.read_text()
    names = list(module.Config.__annotations__)
    body = text[text.index(ruler("data")) :] + (ROOT / "common.py").read_text()
    unread = [n for n in names if not re.search(rf"\bcfg\.{n}\b", body) and n not in READ_BY_COMMON]
    assert not unread
    shared = [n for n in names if n in FLAGS]
    assert shared == [n for n in FLAGS if n in names]
    words = re.search(r"preset: str = \"\"  # ([^;]+);", text).group(1)
    assert words.split(" | ") == list(module.PRESETS)
    for preset in module.PRESETS.values():
        assert set(preset) <= set(names)
        module.Config(**preset)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_nothing_is_used_before_it_is_defined(path):
    tree = ast.parse(path.read_text())
    lines = {n.name: n.lineno for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    early = [
        (n.id, n.lineno)
        for n in ast.walk(tree)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.lineno < lines.get(n.id, 0)
    ]
    assert not early


def test_definitions_of_the_same_name_are_alike():
    seen = {}
    for path in SCRIPTS:
        tree = ast.parse(path.read_text())
        for n in tree.body:
            own = ("main", "train", "sample", "build", "draw", "Config")  # each script's own
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name not in own:
                seen.setdefault(n.name, {})[path.stem] = ast.get_source_segment(path.read_text(), n)
    differ = [name for name, copies in seen.items() if len(set(copies.values())) > 1]
    assert sorted(differ) == sorted(OTHERS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_a_test_and_a_claim_stand_beside_the_script(path):
    assert (ROOT / f"tests/test_{path.name}").exists() and (
        ROOT / f"tests/claims/{path.name}"
    ).exists()
    doc = ast.get_docstring(ast.parse((ROOT / f"tests/claims/{path.name}").read_text()))
    assert "agree" in doc.lower()


def test_tree_has_no_path_of_a_machine_and_stays_small():
    import subprocess

    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
    ).stdout.split()
    files = [ROOT / f for f in files if (ROOT / f).exists()] or list(ROOT.glob("*.py"))
    binary = [f for f in files if f.suffix in (".png", ".gif", ".safetensors", ".npz", ".pt")]
    assert sum(f.stat().st_size for f in binary) < 4 * 2**20
    for f in set(files) - set(binary):
        assert not re.search(r"/(home|root|work|Users)/\w", f.read_text(errors="ignore")), f
