"""Datasets in an S3 server, real but for its disks, over loopback: what is read is what is there.

The server is moto's; Megatron's reader asks it through boto3 as it would ask any other.
"""

from __future__ import annotations

import contextlib
import json
import os

import numpy as np
import pytest
from indexed_files import random_documents, write_dataset
from ranks import Layout, RankError, run_on_ranks

from megatron_direct.config import ParallelConfig
from megatron_direct.data import indexed, object_storage
from megatron_direct.data.blend_plan import Blend
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.samples import MicroBatchLimits, PassShape, Samples
from megatron_direct.errors import UserError
from megatron_direct.mcore import blend, grid
from megatron_direct.mcore.object_storage import read_object_stores

pytest.importorskip("boto3", reason="an optional dependency")
server = pytest.importorskip("moto.server", reason="an optional dependency")


@pytest.fixture(scope="module")
def store():
    """The environment in which an empty bucket is found."""
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    environment = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test",
                   "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with in_environment(environment):
        _client().create_bucket(Bucket="pools")
        yield environment
    running.stop()


@contextlib.contextmanager
def in_environment(environment):
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _client():
    import boto3

    return boto3.client("s3")


def _upload(prefix, name):
    for suffix in (".idx", ".bin"):
        _client().upload_file(prefix + suffix, "pools", name + suffix)
    return f"s3://pools/{name}"


def test_samples_and_digests_are_those_of_the_files(store, tmp_path):
    local = write_dataset(tmp_path / "a", random_documents(40, 50))
    stored = _upload(local, "some/folder/a")
    read_object_stores(str(tmp_path / "cache"))
    assert indexed.dataset_digest(stored) == indexed.dataset_digest(local)
    ours, theirs = (Samples([prefix], 16, 50) for prefix in (local, stored))
    np.testing.assert_array_equal(ours.num_labels, theirs.num_labels)
    for sample in ours.usable:
        np.testing.assert_array_equal(ours.tokens(sample), theirs.tokens(sample))
    shape = PassShape(MicroBatchLimits(4))
    pairs = zip(ours.passes(ours.usable, shape), theirs.passes(theirs.usable, shape), strict=True)
    assert all((a.tokens == b.tokens).all() for left, right in pairs
               for a, b in zip(left, right, strict=True))
    SampleMask(np.ones(40, bool), indexed.dataset_digest(local)).require_belongs_to(stored)
    assert (tmp_path / "cache" / "pools" / "some" / "folder" / "a.idx").is_file()


def test_an_index_that_changed_in_the_store_is_copied_again(store, tmp_path):
    digests = []
    for number, count in enumerate((5, 9)):
        stored = _upload(write_dataset(tmp_path / str(number), random_documents(count, 50)), "b")
        read_object_stores(str(tmp_path / "cache"))
        assert indexed.num_documents(indexed.open_indexed(stored)) == count
        digests.append(indexed.dataset_digest(stored))
    assert digests[0] != digests[1]


def test_tokens_that_are_cut_short_are_refused(store, tmp_path):
    local = write_dataset(tmp_path / "c", random_documents(5, 50))
    with open(local + ".bin", "r+b") as file:
        file.truncate(os.path.getsize(local + ".bin") - 4)
    read_object_stores(str(tmp_path / "cache"))
    with pytest.raises(UserError, match="c.bin is truncated"):
        indexed.check_files(_upload(local, "c"))


def test_what_cannot_be_read_is_named(store, tmp_path, monkeypatch):
    read_object_stores(str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"s3://pools/none.idx cannot be read from its object store"
                                        r".*404.*Correct the path"):
        indexed.check_files("s3://pools/none")
    monkeypatch.setattr(object_storage, "_open", None)
    with pytest.raises(UserError, match="no folder .* index. Give --object-storage-cache-path"):
        indexed.check_files("s3://pools/none")


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """(folder, prefix) of a profile of multi-storage-client whose store is that folder."""
    pytest.importorskip("multistorageclient", reason="an optional dependency")
    folder = tmp_path / "stored"
    folder.mkdir()
    config = tmp_path / "msc.json"
    config.write_text(json.dumps({"profiles": {"pools": {"storage_provider": {
        "type": "file", "options": {"base_path": str(folder)}}}}}))
    monkeypatch.setenv("MSC_CONFIG", str(config))
    return folder, "msc://pools"


def test_multi_storage_client_reads_the_same(profile, tmp_path):
    folder, store = profile
    local = write_dataset(folder / "a", random_documents(40, 50))
    read_object_stores(str(tmp_path / "cache"))
    stored = f"{store}/a"
    assert indexed.dataset_digest(stored) == indexed.dataset_digest(local)
    ours, theirs = (Samples([prefix], 16, 50) for prefix in (local, stored))
    for sample in ours.usable:
        np.testing.assert_array_equal(ours.tokens(sample), theirs.tokens(sample))
    with pytest.raises(UserError, match=r"msc://pools/none.idx cannot be read from its object"):
        indexed.check_files(f"{store}/none")
    keep = np.arange(40) % 3 > 0
    of_files, of_store = (run_on_ranks(1, _sequences, dict(os.environ), [prefix], keep,
                                       tmp_path / name)[0]
                          for prefix, name in ((local, "files"), (stored, "store")))
    assert of_files == of_store


def test_without_multi_storage_client_it_is_named(tmp_path, monkeypatch):
    from megatron.core import msc_utils

    monkeypatch.setattr(msc_utils, "msc", None)
    read_object_stores(str(tmp_path / "cache"))
    with pytest.raises(UserError, match="with the package multi-storage-client. Install it."):
        indexed.check_files("msc://pools/a")


def _sequences(environment, prefixes, keep, cache):
    with in_environment(environment), grid.model_parallel(ParallelConfig()):
        read_object_stores(str(cache / "indexes"))
        masks = {prefix: SampleMask(keep, indexed.dataset_digest(prefix)) for prefix in prefixes}
        request = blend.BlendRequest(8, 20, 1, cache / "blend", blend.Vocabulary(50, "none"))
        dataset, parts = blend.build_blend(Blend(prefixes), masks, request)
        return [dataset[i]["tokens"].numpy().tolist() for i in range(20)], parts[0].tokens


def test_a_masked_blend_draws_the_same_sequences(store, tmp_path):
    local = write_dataset(tmp_path / "d", random_documents(40, 50))
    stored, keep = _upload(local, "d"), np.arange(40) % 3 > 0
    of_files, of_store = (run_on_ranks(1, _sequences, store, [prefix], keep, tmp_path / name)[0]
                          for prefix, name in ((local, "files"), (stored, "store")))
    assert of_files == of_store


def _select(environment, folder, small, stored, name):
    import flat_requests

    from megatron_direct.commands.select import SelectRequest, select

    with in_environment(environment):
        select(flat_requests.make(SelectRequest, ParallelConfig(), **{
            "load": str(small / "theta"), "data_path": (stored,),
            "valid_data_path": (str(small / "valid"),), "run_dir": str(folder / name),
            "object_storage_cache_path": str(folder / "cache"), "sketch_size": 64,
            "num_select": 10, "pilot_iters": 0}))
    return SampleMask.load(folder / name / "selections" / "direct" / "masks"
                           / "pool.mask.npz").digest


@pytest.mark.slow
def test_select_finds_the_same_samples_in_the_store(store, tmp_path, small_folder):
    stored = _upload(str(small_folder / "pool"), "pool")
    found = [run_on_ranks(Layout(dp=2).world_size, _select, store, tmp_path, small_folder, prefix,
                          name)[0]
             for prefix, name in ((str(small_folder / "pool"), "local"), (stored, "stored"))]
    assert found[0] == found[1]


def test_a_store_that_cannot_be_reached_ends_every_rank(tmp_path):
    nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "test",
               "AWS_SECRET_ACCESS_KEY": "test", "AWS_MAX_ATTEMPTS": "1"}
    with pytest.raises(RankError, match="cannot be read from its object store") as error:
        run_on_ranks(2, _digests, nowhere, ["s3://pools/x"], str(tmp_path))
    assert str(error.value).count("UserError") >= 2


def _digests(environment, prefixes, cache):
    from megatron_direct.steps.onset import dataset_digests

    with in_environment(environment):
        read_object_stores(cache)
        return dataset_digests(prefixes)
