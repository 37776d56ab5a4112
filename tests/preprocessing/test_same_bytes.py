"""The output does not depend on how the work is divided, nor on where a run was interrupted."""

from __future__ import annotations

import gzip
import signal
import subprocess
import time
from pathlib import Path

import launching
import pytest
from preprocess_runs import COMMAND, main, outputs


@pytest.mark.parametrize("flags", [("--workers", "2"), ("--workers", "3", "--shard-size", "0.001"),
                                   ("--shard-size", "0.0005")])
def test_workers_and_shard_size_change_no_byte(text, tmp_path, reference, changes, flags):
    text.run(tmp_path / "x", *changes, *flags)
    assert outputs(tmp_path / "x") == reference


@pytest.mark.parametrize(("suffix", "package"), [("gz", None), ("zst", "zstandard")])
def test_compression_changes_no_byte(text, tmp_path, reference, changes, suffix, package):
    compress = pytest.importorskip(package).compress if package else gzip.compress
    inputs = [tmp_path / f"{path.name}.{suffix}" for path in (text.notes, text.plain)]
    for path, plain in zip(inputs, (text.notes, text.plain), strict=True):
        path.write_bytes(compress(plain.read_bytes()))
    text.run(tmp_path / "x", *changes, "--shard-size", "0.005", "--workers", "2", inputs=inputs)
    assert outputs(tmp_path / "x") == reference


def test_empty_files_add_nothing(text, tmp_path, reference, changes):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b""))
    text.run(tmp_path / "x", *changes, inputs=[
        text.notes, tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", text.plain])
    assert outputs(tmp_path / "x") == reference


def test_parquet_changes_no_byte(text, tmp_path, reference, changes):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(text.records), tmp_path / "notes.parquet",
                        row_group_size=50)
    text.run(tmp_path / "x", *changes, "--shard-size", "0.005",
             inputs=[tmp_path / "notes.parquet", text.plain])
    assert outputs(tmp_path / "x") == reference


@pytest.mark.parametrize(("launcher", "ranks", "workers"), [
    (launching.mpich, 3, 1), (launching.torchrun, 2, 2),
    pytest.param(launching.open_mpi, 2, 1, marks=pytest.mark.slow)],
    ids=lambda value: getattr(value, "__name__", str(value)))
def test_ranks_change_no_byte(text, tmp_path, reference, changes, launcher, ranks, workers):
    done = _launched(launcher(ranks), text.flags(tmp_path / "x", *changes, "--shard-size", "0.002",
                                     "--workers", str(workers)))
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path / "x") == reference
    for name in reference:  # by one of the ranks
        if name.endswith(".idx"):
            assert done.stdout.count(f"/x{name.removesuffix('.idx')}: ") == 1, done.stdout


@pytest.mark.parametrize("launcher", [launching.mpich, launching.torchrun],
                         ids=lambda launcher: launcher.__name__)
def test_an_error_ends_all_ranks(text, tmp_path, launcher):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    done = _launched(launcher(2), text.flags(
        tmp_path / "x", inputs=[text.notes, tmp_path / "bad.jsonl"]))
    assert done.returncode != 0 and "bad.jsonl:2 is not a JSON object" in done.stderr
    assert not (tmp_path / "x_notes_pool.idx").exists()


def _launched(launcher: list[str] | None, flags: list[str]) -> subprocess.CompletedProcess:
    if launcher is None:
        pytest.skip("there is no such mpirun")
    if "torch.distributed.run" in launcher:  # it starts Python itself
        return launching.run([*launcher, *COMMAND[1:], *flags])
    pytest.importorskip("mpi4py")
    return launching.run([*launcher, *COMMAND, *flags])


def _killed(flags: list[str], shards: Path, pattern: str, count: int) -> None:
    """Runs the command, and kills it once so many shards match the pattern."""
    run = subprocess.Popen([*COMMAND, *flags], stdout=subprocess.DEVNULL)
    while len(list(shards.glob(pattern))) < count and run.poll() is None:
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL


def test_a_killed_run_is_carried_on(text, tmp_path, reference, changes, capsys):
    flags = text.flags(tmp_path / "x", *changes, "--shard-size", "0.0002", "--workers", "2")
    folder = tmp_path / "x.shards"
    _killed(flags, folder, "0*.json", 20)
    time.sleep(1)  # the workers end with it
    finished = sorted(folder.glob("0*.json"))
    total = sum(-(-path.stat().st_size // 209) for path in (text.notes, text.plain))
    assert 20 <= len(finished) < total
    assert not list(tmp_path.glob("x_*"))

    with pytest.raises(SystemExit, match="x.shards holds the shards of an unfinished run with "
                                         "different seed.*delete the folder"):
        main([*flags, "--seed", "5"])
    main(flags)
    assert f"x.shards has {len(finished)} of {total} finished shards" in capsys.readouterr().out
    assert outputs(tmp_path / "x") == reference


def test_a_killed_run_takes_up_a_compressed_file(text, tmp_path, reference, changes, capsys):
    inputs = [tmp_path / f"{path.name}.gz" for path in (text.notes, text.plain)]
    for path, plain in zip(inputs, (text.notes, text.plain), strict=True):
        path.write_bytes(gzip.compress(plain.read_bytes()))
    flags = text.flags(tmp_path / "x", *changes, "--shard-size", "0.0002", inputs=inputs)
    # All of the first file and some of the second.
    _killed(flags, tmp_path / "x.shards", "000001-*.json", 3)
    main(flags)
    assert "x.shards has 1 of 2 finished shards" in capsys.readouterr().out
    assert outputs(tmp_path / "x") == reference
