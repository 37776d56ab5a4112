"""A corpus out of wheels, made up here, so that none is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "pypi_text.py"
DOCSTRING = "What this module does, told at such a length that it makes a passage of its own."
CODE = "\n".join(f"value_{number} = compute({number}, scale=0.5)" for number in range(12))


def _wheel(folder: Path, name: str, version: str, files: dict[str, str | bytes]) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, content in files.items():
            archive.writestr(inner, content)
    return path


def _records(folder: Path, part: str, domain: str) -> list[dict]:
    text = gzip.decompress((folder / part / f"{domain}.jsonl.gz").read_bytes()).decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_each_package_is_in_one_part_and_no_passage_in_two(tmp_path):
    wheels, output = tmp_path / "wheels", tmp_path / "text"
    wheels.mkdir()
    shared = "A page that two packages ship, word for word, and that is long enough to keep. " * 2
    learnt = _wheel(wheels, "learnt_from", "1.0", {
        "learnt/__init__.py": f'"""{DOCSTRING}"""\n{CODE}\n', "learnt/shared.rst": shared,
        "learnt/broken.py": "def (:\n", "learnt/latin.txt": "caf\xe9 ".encode("latin-1") * 99,
        "learnt/tests/test_it.py": CODE.replace("value", "tested"),
        "learnt/locale/de.po": 'msgid "one"\nmsgstr "eins"\n' * 9,
        "learnt/minified.js": "x=1;" * 500, "learnt/russian.md": "слово " * 60,
        "learnt_from-1.0.dist-info/METADATA": f"Name: learnt\n\nDescription. {DOCSTRING}",
        "learnt_from-1.0.dist-info/LICENSE.txt": "All rights are reserved, all of them. " * 9})
    _wheel(wheels, "tested.on", "2.1", {"tested/shared.rst": shared, "tested/own.md": shared[::-1]})
    packages = tmp_path / "packages.txt"
    packages.write_text("pretrain learnt-from==1.0  # a comment\n\ntest tested.on==2.1\n")
    subprocess.run([sys.executable, TOOL, "--output-dir", output, "--packages", packages,
                    "--wheels", wheels, "--passage-characters", "200"], check=True)

    prose = [record["text"] for record in _records(output, "pretrain", "prose")]
    assert DOCSTRING in prose and any(text.startswith("Description.") for text in prose)
    assert shared.strip() in prose and not any("reserved" in text for text in prose)
    code = "\n".join(record["text"] for record in _records(output, "pretrain", "python"))
    assert code == CODE.replace("'", '"') and "tested" not in code
    assert len(_records(output, "pretrain", "po")) >= 1
    assert _records(output, "pretrain", "markup") == []
    tested = _records(output, "test", "prose")
    assert [record["text"] for record in tested] == [shared[::-1].strip()]
    assert tested[0]["package"] == "tested.on" and tested[0]["file"] == "tested.on/tested/own.md"

    record = json.loads((output / "corpus.json").read_text())
    first, second = record["packages"]
    assert (first["name"], first["version"], first["part"]) == ("learnt-from", "1.0", "pretrain")
    assert first["sha256"] == hashlib.sha256(learnt.read_bytes()).hexdigest()
    assert second["characters"] == {"prose": len(shared.strip())}
