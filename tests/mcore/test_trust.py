"""Files that would run a program when they are opened: none does."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from indexed_files import random_documents, write_dataset
from ranks import RankError, run_on_ranks

from megatron_direct.cli import main as cli
from megatron_direct.data.blend_plan import Blend
from megatron_direct.errors import UserError
from megatron_direct.mcore import blend_cache, checkpoint_contents
from megatron_direct.runtime import arrays


class _Creates:
    """A pickle of it creates a file where it is opened."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self):
        return open, (str(self._path), "w")


def _checkpoint(folder: Path, metadata: bytes) -> Path:
    folder.mkdir()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / ".metadata").write_bytes(metadata)
    return folder


def test_a_checkpoint_is_looked_at_without_running_what_it_holds(tmp_path, capsys):
    created = tmp_path / "created"
    attack = pickle.dumps(_Creates(created))
    pickle.loads(attack).close()
    assert created.is_file()  # so that the test can fail
    created.unlink()
    folder = _checkpoint(tmp_path / "theta", attack)
    with pytest.raises(SystemExit) as status:
        cli.main(["inspect", "--checkpoint", str(folder)])
    assert status.value.code == 1 and not created.exists()
    assert "theta/.metadata is damaged, or is not what it seems (it names" in \
        capsys.readouterr().err


@pytest.mark.parametrize("call", [
    b"cos\nsystem\n(S'true'\ntR.", b"ctorch\nload\n(S'x'\ntR.", b"ctorch.serialization\nload\n.",
    b"cbuiltins\neval\n(S'1'\ntR.", b"ctorch.hub\nload\n.", b"", b"x", pickle.dumps(3)])
def test_a_metadata_file_names_nothing_but_what_torch_writes(tmp_path, call):
    with pytest.raises(UserError, match=r"\.metadata is damaged, or is not what it seems"):
        checkpoint_contents.tensors_in(_checkpoint(tmp_path / "theta", call))


def test_a_checkpoint_is_listed(small_folder, capsys):
    """As it was saved: names and shapes from the weights themselves."""
    with pytest.raises(SystemExit) as status:
        cli.main(["inspect", "--checkpoint", str(small_folder / "theta")])
    assert status.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["embedding.word_embeddings.weight", "64", "x", "16", "float32"]
               for line in lines)
    assert lines[-1] == "checksums: as written"
    file = next((small_folder / "theta" / "iter_0000006").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SystemExit) as status:
        cli.main(["inspect", "--checkpoint", str(small_folder / "theta")])
    assert status.value.code == 1
    assert f"{file.name} is damaged: its SHA-256" in capsys.readouterr().err


def _build(folder: Path) -> None:
    from megatron_direct.mcore import blend

    dataset, _ = blend.build_blend(Blend([str(folder / "a"), str(folder / "b")]), {},
                                   blend.BlendRequest(8, 16, 3, folder / "cache",
                                                      blend.Vocabulary(60, "test")))
    for number in range(16):
        dataset[number]


def test_a_pickle_in_an_index_cache_is_never_run(tmp_path):
    """Built again where it is not what was written; refused where the record is forged too."""
    for seed, name in enumerate("ab"):
        write_dataset(tmp_path / name, random_documents(20, 60, seed=seed))
    run_on_ranks(1, _build, tmp_path)
    run_on_ranks(1, _build, tmp_path)  # from the cache
    cache = tmp_path / "cache"
    caches = sorted(cache.glob("*.npy"))
    assert len(caches) == 8  # three of each dataset, two of the blend
    sound = {path: path.read_bytes() for path in caches}
    record = (cache / "whole.json").read_bytes()
    created = tmp_path / "created"
    attack = np.empty(1, object)
    attack[0] = _Creates(created)
    for path in caches[::3]:
        np.save(path, attack, allow_pickle=True)
        run_on_ranks(1, _build, tmp_path)
        assert path.read_bytes() == sound[path]

        np.save(path, attack, allow_pickle=True)
        _forge(cache, path)
        with pytest.raises(RankError, match=f"{path.name} is damaged.*pickled objects.*Delete it"):
            run_on_ranks(1, _build, tmp_path)
        path.write_bytes(pickle.dumps(_Creates(created)))
        _forge(cache, path)
        with pytest.raises(RankError, match=f"{path.name} is damaged"):
            run_on_ranks(1, _build, tmp_path)
        path.write_bytes(sound[path])
        (cache / "whole.json").write_bytes(record)
    assert not created.exists()
    run_on_ranks(1, _build, tmp_path)


def _forge(cache: Path, path: Path) -> None:
    """As whoever may write there can."""
    record = json.loads((cache / "whole.json").read_text())
    record[path.name] = blend_cache._digest(path)
    (cache / "whole.json").write_text(json.dumps(record))


def test_an_index_that_a_full_disk_cut_off_is_built_again(tmp_path):
    for seed, name in enumerate("ab"):
        write_dataset(tmp_path / name, random_documents(20, 60, seed=seed))
    run_on_ranks(1, _build, tmp_path)
    sound = {path: path.read_bytes() for path in (tmp_path / "cache").glob("*.npy")}
    (tmp_path / "cache" / "whole.json").unlink()  # it comes last
    for path, content in sound.items():
        path.write_bytes(content[:128])  # numpy's header
    run_on_ranks(1, _build, tmp_path)
    assert sound == {path: path.read_bytes() for path in sound}


@pytest.mark.parametrize("write", ["npy", "npz", "raw"])
def test_no_array_of_ours_is_unpickled(tmp_path, write):
    created, path = tmp_path / "created", tmp_path / "a"
    attack = np.empty(1, object)
    attack[0] = _Creates(created)
    with open(path, "wb") as file:
        if write == "raw":
            pickle.dump(_Creates(created), file)
        elif write == "npy":
            np.save(file, attack, allow_pickle=True)
        else:
            np.savez(file, values=attack, allow_pickle=True)
    read = arrays.read_npz if write == "npz" else arrays.read_npy
    with pytest.raises(UserError, match="a is damaged, or not what it should be .*make it again"):
        read(path, "Please make it again.")
    assert not created.exists()


def test_arrays_are_read_as_numpy_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    values = {"c": rng.normal(size=(3, 4)), "f": np.asfortranarray(rng.normal(size=(3, 4))),
              "none": np.empty((0, 3)), "text": np.array(["a", "bcd"]), "one": np.array(True)}
    np.savez(tmp_path / "a.npz", **values)
    found = arrays.read_npz(tmp_path / "a.npz", "")
    assert found.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value)
        np.save(tmp_path / "a.npy", value)
        for mapped in (False, True):
            read = arrays.read_npy(tmp_path / "a.npy", "", mapped=mapped)
            np.testing.assert_array_equal(read, value)
            assert read.dtype == value.dtype
