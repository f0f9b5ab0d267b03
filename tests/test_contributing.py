"""CONTRIBUTING.md's walk through a model family is true to the code: its files exist, and its lines stand in them. And
`make test` runs all tests that there are.
"""

import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = (
    "tests/tiny_models.py", "trtllm_cli/convert/families/gpt_neox.py", "trtllm_cli/convert/families/fused_qkv.py",
    "trtllm_cli/models/gpt_neox.py", "trtllm_cli/models/gpt2.py", "trtllm_cli/models/layers.py",
)  # fmt: skip
WALK = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a model family\n")[1].split("\n## ")[0]


def test_its_lines_are_the_codes():
    code = {line.strip() for source in SOURCES for line in (ROOT / source).read_text().splitlines()}
    shown = [line.strip() for line in WALK.splitlines() if line.startswith("    ") and line.strip() != "..."]
    quoted = [line for line in shown if not line.startswith("trtllm ")]
    assert len(quoted) > 30
    assert [line for line in quoted if line not in code] == []


def test_its_files_exist():
    names = re.findall(r"`([\w/.-]+\.(?:py|json))`", WALK)
    files = [str(path.relative_to(ROOT)) for top in ("trtllm_cli", "tests") for path in (ROOT / top).rglob("*.*")]
    theirs = {"configuration_gpt_neox.py", "modeling_gpt_neox.py", "config.json"}
    missing = [n for n in names if n not in theirs and not any(f"/{file}".endswith(f"/{n}") for file in files)]
    assert names
    assert missing == []


def test_no_folder_of_tests_is_left_out(pytestconfig):
    """pytest leaves out some names of folders, `build` among them unless told otherwise."""
    left_out = pytestconfig.getini("norecursedirs")
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert ROOT / "tests" / "build" in folders
    assert [f for f in folders if any(fnmatch(part, p) for part in f.relative_to(ROOT).parts for p in left_out)] == []
