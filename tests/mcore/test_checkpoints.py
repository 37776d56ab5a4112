"""Checkpoints: training resumed in other layouts, formats told apart, reading on one rank alone."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pickle
import re
import shutil
from traceback import StackSummary

import numpy as np
import pytest
import torch
import trained_checkpoint
from ranks import Layout, RankError, on_layout, run_on_ranks
from tiny_models import MODELS
from torch.distributed.checkpoint.api import CheckpointException
from trained_checkpoint import CASES, STEPS, Case, require_equal, resume, save

from megatron_direct.config import Job, OptimizerConfig
from megatron_direct.errors import UserError
from megatron_direct.mcore import checkpoint, compat, integrity, shards, training_folder
from megatron_direct.mcore.checkpoint_contents import tensors_in

LLAMA = MODELS["llama-tied"]


# Experts are in the other mixture, too.
@pytest.mark.parametrize("case", [
    pytest.param(case, marks=pytest.mark.slow if case.model == "qwen2-moe" else ())
    for case in CASES], ids=str)
def test_training_goes_on_in_another_layout(tmp_path, case):
    expected = save(case, tmp_path)
    require_equal(resume(case, tmp_path), expected)
    with pytest.raises(AssertionError):  # so the test can fail
        require_equal(expected, type(expected)(expected.weights, expected.losses[::-1]))


EXPERTS = Case("qwen2-moe", Layout(dp=2, ep=2), Layout(dp=2, ep=2))


def _save_as_earlier(model, layout, case, folder):
    """As versions did that numbered optimizers in the names of their tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "checkpoint_metadata",
                      functools.partial(checkpoint.checkpoint_metadata, chained_prefix=True))
        return trained_checkpoint._save(model, layout, case, folder)


@pytest.mark.parametrize(("numbered", "distributed"), [
    (False, True), *(pytest.param(*names, marks=pytest.mark.slow)
                     for names in ((False, False), (True, False), (True, True)))])
def test_optimizers_of_experts_are_read_under_the_names_of_either_way(
        tmp_path, numbered, distributed):
    """Megatron-LM writes names without a number."""
    case = dataclasses.replace(EXPERTS, distributed_optimizer=distributed)
    if numbered:
        ranks = on_layout(case.written, _save_as_earlier, MODELS[case.model], case, str(tmp_path))
        expected = trained_checkpoint._whole(ranks)
    else:
        expected = save(case, tmp_path)
    names = {tensor.name for tensor in tensors_in(tmp_path / f"iter_{STEPS:07d}")}
    assert any(name.startswith("chained_1.optimizer.state.") for name in names) == numbered
    assert any(name.startswith("optimizer.state.") for name in names) != numbered
    require_equal(resume(case, tmp_path), expected)


def _save_of_one_layout(model, layout, case, folder):
    """As Megatron-LM does by default."""
    def metadata(*given):
        return {**shards.checkpoint_metadata(*given),
                "distrib_optim_sharding_type": "dp_reshardable"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "checkpoint_metadata", metadata)
        return trained_checkpoint._save(model, layout, case, folder)


def test_an_optimizer_that_lies_as_in_one_layout_is_known_before_it_is_loaded(tmp_path):
    case = Case("llama-tied", Layout(dp=2), Layout(dp=2), distributed_optimizer=True)
    on_layout(case.written, _save_of_one_layout, MODELS[case.model], case, str(tmp_path))
    found = checkpoint.read_checkpoint(tmp_path)
    assert found.has_optimizer and not found.has_readable_optimizer
    with pytest.raises(RankError, match=r"holds its optimizer \(optimizer.distributed.* as it lies "
                                        "in one layout"):
        resume(case, tmp_path)


def test_an_optimizer_of_experts_that_were_distributed_otherwise_is_refused(tmp_path):
    case = Case("qwen2-moe", Layout(), Layout(dp=2, ep=2))
    save(case, tmp_path)
    with pytest.raises(RankError, match="was saved by one optimizer, and this layout has 2 opt.*"
                                        "expert-model-parallel-size of the training, or add"):
        resume(case, tmp_path)
    otherwise = dataclasses.replace(case, written=case.read, read=case.written)
    save(otherwise, tmp_path)
    with pytest.raises(RankError, match="was saved by 2 optimizers, and this layout has one optim"):
        resume(otherwise, tmp_path)


def _save_bare(model, layout, folder):
    from megatron_direct.mcore import model as models

    checkpoint.save(folder, 7, models.build(Job(model, layout)), None, None,
                    {**vars(model), "extra": {"nested": [1, 2]}})


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The checkpoint of an untrained model, without an optimizer."""
    folder = tmp_path_factory.mktemp("bare")
    on_layout(Layout(), _save_bare, LLAMA, str(folder))
    return folder


def _load_bare(model, layout, folder):
    from megatron_direct.mcore import model as models

    found = checkpoint.open_checkpoint(folder)
    checkpoint.load_model(found.path, models.build(Job(model, layout)))


@pytest.mark.parametrize("layout", [
    pytest.param(Layout(), marks=pytest.mark.slow), Layout(dp=2)], ids=str)
def test_a_damaged_file_is_named_with_an_older_checkpoint(bare, tmp_path, layout):
    """One flipped bit anywhere, a file that is cut short, and one that is gone."""
    folder = shutil.copytree(bare, tmp_path / "theta")
    newest = folder / "iter_0000007"
    shutil.copytree(newest, folder / "iter_0000003")
    names = sorted(path.name for path in newest.iterdir())
    assert json.loads((newest / integrity.MANIFEST).read_text())["files"].keys() == \
        set(names) - {integrity.MANIFEST}
    on_layout(layout, _load_bare, LLAMA, folder)
    rng = np.random.default_rng(0)
    for number, name in enumerate(name for name in names if name != integrity.MANIFEST):
        whole = (newest / name).read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        if number == 1:
            damaged = damaged[:-1]
        (newest / name).write_bytes(damaged)
        if number == 2:
            (newest / name).unlink()
        match = re.escape(name) + ".* is damaged.*iter_0000003: write 3 into its latest_check"
        # metadata.json tells the format, which is looked at first.
        if name == "metadata.json":
            match = re.escape(name)
        with pytest.raises(RankError, match=match):
            on_layout(layout, _load_bare, LLAMA, folder)
        (newest / name).write_bytes(whole)
    (newest / "metadata.json").rename(tmp_path / "metadata.json")  # then it looks like torch's own
    with pytest.raises(RankError, match="metadata.json is damaged"):
        on_layout(layout, _load_bare, LLAMA, folder)
    (tmp_path / "metadata.json").rename(newest / "metadata.json")
    on_layout(layout, _load_bare, LLAMA, folder)
    (newest / integrity.MANIFEST).write_text('{"algorithm": "sha256", "files": []}')
    with pytest.raises(RankError, match="integrity.json is damaged"):
        on_layout(layout, _load_bare, LLAMA, folder)
    (newest / integrity.MANIFEST).unlink()  # as of an older version, or of another tool
    on_layout(layout, _load_bare, LLAMA, folder)
    for path in newest.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RankError, match="UserError: .*iter_0000007 cannot be read .*It is damaged"):
        on_layout(layout, _load_bare, LLAMA, folder)


def _read_on_rank_zero_alone(folder):
    """What rank 0 reads while no other rank calls anything: a collective would find them out."""
    from megatron_direct.runtime import parallel

    seen = []
    if parallel.is_rank_zero():
        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_gather_object", "all_gather", "all_reduce", "barrier", "broadcast",
                         "broadcast_object_list", "gather_object", "scatter_object_list"):
                patch.setattr(torch.distributed, name, _refuse)
            found = checkpoint.read_checkpoint(folder)
        seen = [found.iteration, found.arguments["extra"], found.has_optimizer]
    parallel.barrier()
    return seen


def _refuse(*_arguments, **_keywords):
    raise AssertionError("a collective, where only one rank reads")


def test_one_rank_reads_what_a_checkpoint_carries(bare):
    zero, one = run_on_ranks(2, _read_on_rank_zero_alone, bare)
    assert zero == [7, {"nested": [1, 2]}, False] and one == []


def test_the_digest_is_of_the_files(bare, tmp_path):
    before = checkpoint.read_checkpoint(bare).digest
    assert checkpoint.read_checkpoint(bare / "iter_0000007").digest == before
    on_layout(Layout(), _save_bare, LLAMA, str(tmp_path))
    (tmp_path / "iter_0000007" / integrity.MANIFEST).unlink()
    before = checkpoint.read_checkpoint(tmp_path).digest
    file = next((tmp_path / "iter_0000007").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert checkpoint.read_checkpoint(tmp_path).digest != before


def _folder(tmp_path, *files: str, **contents: str):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(contents.get(name, ""))
    return tmp_path


@pytest.mark.parametrize(("files", "match"), [
    ((), "holds no Megatron distributed checkpoint: expected latest_checkpointed_iteration.txt"),
    ((".metadata", "__0_0.distcp"), r"fsdp_dtensor or torch_dcp\), and torch_dist is expected.*"
                                    "checkpoint_inspector.py convert-fsdp-dtensor-to-torch-dist"),
    (("mp_rank_00/model_optim_rng.pt",), "old format .*--ckpt-convert-format torch_dist"),
])
def test_other_formats_are_refused_with_the_way_out(tmp_path, files, match):
    with pytest.raises(UserError, match=match):
        checkpoint.read_checkpoint(_folder(tmp_path, *files))


def test_a_format_is_told_also_where_a_tracker_names_the_iteration(tmp_path):
    _folder(tmp_path / "iter_0000012", ".metadata")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    with pytest.raises(UserError, match="iter_0000012 is in torch's own format"):
        checkpoint.read_checkpoint(tmp_path)


@pytest.mark.parametrize(("text", "match"), [
    ('{"sharded_backend": "zarr"}', "zarr format.*Convert it with Megatron-LM core_v0.15"),
    ('{"sharded_backend": "other"}', "in the format other, and torch_dist is expected"),
    ('{"sharded_backend"', "metadata.json names no format"),
    ("[]", "metadata.json names no format"),
])
def test_other_backends_are_refused_with_the_way_out(tmp_path, text, match):
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(UserError, match=match):
        checkpoint.read_checkpoint(tmp_path)


def test_a_checkpoint_of_a_later_version_is_refused(bare, tmp_path, monkeypatch):
    """Without common.pt, by a megatron-core that looks for it alone."""
    from megatron.core import dist_checkpointing

    def load_of_an_earlier_version(state, folder, sharded_strategy=None, common_strategy=None):
        raise AssertionError("not reached")

    monkeypatch.setattr(dist_checkpointing, "load", load_of_an_earlier_version)
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    with pytest.raises(UserError, match="written by megatron-core 0.19 or later, which "
                                        f"megatron-core {compat.version()}, installed here"):
        checkpoint.read_checkpoint(tmp_path)


def test_a_version_that_keeps_all_in_one_place_needs_no_common_file(tmp_path, monkeypatch):
    from megatron.core import dist_checkpointing

    monkeypatch.setattr(dist_checkpointing, "load", lambda state, folder: None)
    assert compat.can_read_common_state(tmp_path)


class _Unknown:
    """Stands for a class that another version's checkpoint carries."""


def test_objects_of_another_version_are_named(tmp_path):
    """Read with torch's own restrictions, which name what they do not know."""
    (tmp_path / "metadata.json").write_text(json.dumps(
        {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
         "common_backend_version": 1}))
    torch.save({"args": argparse.Namespace(kind=_Unknown()), "iteration": 1},
               tmp_path / "common.pt")
    with pytest.raises(UserError, match="holds objects that this megatron-core does not support.*"
                                        "Use the version that wrote"):
        checkpoint.read_checkpoint(tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        compat.load_common_state(tmp_path)


def _load(model, layout, folder):
    from megatron_direct.mcore import model as models

    checkpoint.load_model(training_folder.latest(folder), models.build(Job(model, layout)))


def test_a_model_of_another_shape_is_refused(bare):
    with pytest.raises(RankError, match=r"holds .* for .*, but the flags describe a model with"):
        on_layout(Layout(), _load, MODELS["gpt2-tied"], str(bare))


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)], ids=str)
def test_weights_that_the_model_lacks_are_refused(tmp_path, layout):
    """A model without head norms takes a place in the file for each of its weights."""
    on_layout(Layout(), _save_bare, MODELS["qwen3"], str(tmp_path))
    without = dataclasses.replace(MODELS["qwen3"], qk_layernorm=False)
    with pytest.raises(RankError, match="holds decoder.layers.self_attention.k_layernorm.weight, "
                                        "which the model that the flags describe does not have"):
        on_layout(layout, _load, without, str(tmp_path))


def _arguments_of_megatron_lm(**given):
    return {"padded_vocab_size": 64, "group_query_attention": False, "num_query_groups": 1,
            **given}


@pytest.mark.parametrize(("given", "match"), [
    ({"use_mup": True}, "--use-mup True: this is not supported"),
    ({"window_size": [128, 0]}, "--window-size"),
    ({"moe_mlp_glu_interleave_size": 32}, "--moe-mlp-glu-interleave-size 32"),
    ({"moe_expert_capacity_factor": 1.5}, "--moe-expert-capacity-factor 1.5"),
    ({"moe_router_load_balancing_type": "sinkhorn"}, "--moe-router-load-balancing-type sinkhorn"),
    ({"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]}, "-type .'aux_loss', 'sinkhorn'"),
])
def test_models_that_later_versions_can_train_and_we_cannot_build_are_refused(
        tmp_path, given, match):
    from megatron_direct.mcore import arguments

    assert arguments.translated(_arguments_of_megatron_lm(), tmp_path)["vocab_size"] == 64
    with pytest.raises(UserError, match=match):
        arguments.translated(_arguments_of_megatron_lm(**given), tmp_path)


def test_what_changes_the_speed_alone_is_no_reason_to_refuse(tmp_path):
    from megatron_direct.mcore import arguments

    arguments.translated(_arguments_of_megatron_lm(
        moe_grouped_gemm=True, moe_shared_expert_overlap=True, tp_comm_overlap=True,
        moe_router_load_balancing_type=["seq_aux_loss", "global_aux_loss"]), tmp_path)


def test_the_form_of_a_decay_is_carried_from_a_training_that_had_one(tmp_path):
    from megatron_direct.mcore import arguments

    for style, carried in (("WSD", True), ("cosine", False)):
        found = arguments.translated(_arguments_of_megatron_lm(
            lr_decay_style=style, lr_wsd_decay_style="exponential"), tmp_path)
        assert ("lr_wsd_decay_style" in found) == carried


def test_gelu_has_the_form_that_it_was_trained_with(tmp_path):
    from megatron_direct.mcore import arguments

    for given, fused in (({"add_bias_linear": True}, True),
                         ({"add_bias_linear": True, "swiglu": True}, False),
                         ({"add_bias_linear": False}, False)):
        for switch in (True, False):
            found = arguments.translated(_arguments_of_megatron_lm(
                bias_gelu_fusion=switch, **{"swiglu": False, **given}), tmp_path)
            assert found["bias_gelu_fusion"] == (fused and switch)


def test_an_argument_that_says_nothing_leaves_the_default(tmp_path):
    found = checkpoint.Checkpoint(tmp_path, 1, {"lr": None, "clip_grad": 0.5}, False, "")
    assert found.settings(OptimizerConfig, {}) == OptimizerConfig(clip_grad=0.5)


def test_a_full_disk_that_torch_does_not_name_is_told(tmp_path):
    words = r"iter_0000002 cannot be written \(only a part of it .* Free some space"
    with pytest.raises(UserError, match=words), \
            checkpoint._disk_errors_told(tmp_path / "iter_0000002"):
        torch.save({"weights": torch.ones(100_000)}, "/dev/full")


def test_a_full_disk_that_a_writer_of_megatrons_met_is_told(tmp_path):
    """torch's exception for it is no Exception."""
    met = CheckpointException("write", {0: (RuntimeError(
        "Worker failure: [Errno 28] No space left on device"), StackSummary())})
    with pytest.raises(UserError, match="iter_0000002 cannot be written .No space left"), \
            checkpoint._disk_errors_told(tmp_path / "iter_0000002"):
        raise met
