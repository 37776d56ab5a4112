"""Text that every Python installation has, so that the embedded run needs no download.

    python tools/embedded_text.py --output-dir build/text

writes three domains as JSONL, ``docstrings.jsonl``, ``source.jsonl`` and ``licenses.jsonl``. A
record has ``text``, and ``file``, the file it comes from. ``preprocess_selection.py --group-key
file`` keeps the records of one file together, so that no file is both in the pool and in a test
set.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SHORTEST_CHARACTERS = 80
# Packages whose license texts are read, if they are installed: by name, since the text is not to
# change with the tools that tests and style checks need.
LICENSED = set("""
    anyio click contourpy cycler filelock fonttools fsspec h11 hf_xet httpcore2 httpx2
    huggingface_hub hypothesis idna iniconfig jinja2 kiwisolver markupsafe matplotlib mpi4py mpich
    mpmath networkx numpy packaging pillow pip pluggy psutil pyarrow pygments pyparsing pytest
    pyyaml ruff scipy setuptools sortedcontainers sympy torch tqdm truststore typing_extensions
    tzdata zstandard""".split())


def python_files(root: Path) -> list[Path]:
    """The standard library's own files, in a fixed order; no tests, no packages."""
    return [path for path in sorted(root.rglob("*.py"))
            if not {"test", "tests", "idle_test", "site-packages", "lib2to3"} & set(
                path.relative_to(root).parts)]


def docstrings(path: Path, length: int) -> Iterator[str]:
    """Passages of a file's docstrings, joined: most docstrings are far shorter than a passage."""
    try:
        yield from passages(docstrings_of(path.read_text(encoding="utf-8")), length)
    except (SyntaxError, UnicodeDecodeError):
        return


def docstrings_of(code: str) -> str:
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(code)) if isinstance(
        node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    return "\n\n".join(text for text in found if text)


def source(path: Path, length: int) -> Iterator[str]:
    """Code without its docstrings and comments, so that the domains do not share text."""
    try:
        yield from passages(code_of(path.read_text(encoding="utf-8")), length)
    except (SyntaxError, UnicodeDecodeError):
        return


def code_of(code: str) -> str:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) \
                and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def passages(text: str, length: int) -> Iterator[str]:
    """Pieces of about ``length`` characters, cut at line ends."""
    piece: list[str] = []
    for line in text.splitlines():
        piece.append(line)
        if sum(map(len, piece)) >= length:
            yield "\n".join(piece).strip()
            piece = []
    if sum(map(len, piece)) >= SHORTEST_CHARACTERS:
        yield "\n".join(piece).strip()


def license_files(root: Path, packages: Path) -> list[Path]:
    """License texts of the standard library and of the packages that are installed."""
    found = [path for path in packages.rglob("*")
             if path.is_file()
             and path.relative_to(packages).parts[0].split("-")[0] in LICENSED
             and path.suffix in ("", ".txt", ".md", ".rst")
             and any(word in path.name.upper() for word in ("LICENSE", "LICENCE", "COPYING"))]
    return [*(path for path in (root / "LICENSE.txt",) if path.is_file()), *sorted(found)]


def write_domain(path: Path, records: Iterator[tuple[str, str]]) -> tuple[int, int]:
    """(records, characters) written; repeated passages are left out."""
    seen: set[str] = set()
    characters = 0
    with open(path, "w", encoding="utf-8") as file:
        for name, text in records:
            if text not in seen:
                seen.add(text)
                characters += len(text)
                file.write(json.dumps({"text": text, "file": name}) + "\n")
    return len(seen), characters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output-dir", required=True, type=Path)
    parser.add_argument("--part", default="1/1", metavar="I/N",
                        help="every N-th file and license passage, from the I-th on: parts share "
                             "no file (default %(default)s)")
    parser.add_argument("--max-files", type=int, default=250,
                        help="Python files that are read at most, every so many-th of them "
                             "(default %(default)s)")
    parser.add_argument("--passage-characters", type=int, default=600,
                        help="length of a passage, to the next line end (default %(default)s: "
                             "about one training sequence of the embedded model)")
    flags = parser.parse_args()
    root = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    length = flags.passage_characters
    part, of = (int(number) for number in flags.part.split("/"))
    files = python_files(root)[part - 1:: of]
    some = files[:: max(1, len(files) // flags.max_files)][: flags.max_files]
    licenses = license_files(root, packages)
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    domains = {
        "docstrings": ((str(p.relative_to(root)), t) for p in some for t in docstrings(p, length)),
        "source": ((str(p.relative_to(root)), t) for p in some for t in source(p, length)),
        # Few files, some very long, many alike: here each passage counts as a file of its own.
        "licenses": ((f"{p.name} {i}", t) for p in licenses for i, t in enumerate(
            passages(p.read_text(encoding="utf-8", errors="replace"), length))
            if i % of == part - 1),
    }
    for name, records in domains.items():
        count, characters = write_domain(flags.output_dir / f"{name}.jsonl", records)
        print(f"{name}: {count} passages, {characters} characters")


if __name__ == "__main__":
    main()
