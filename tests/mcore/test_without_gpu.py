"""Everything megatron_runtime() replaces is put back, also when the work inside fails."""

from __future__ import annotations

import sys

import launching
import pytest
import torch

from megatron_direct.mcore import without_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced where there is a GPU")
def test_what_is_replaced_is_put_back():
    replaced = [(owner, name, getattr(owner, name)) for owner, name, _ in without_gpu._stand_ins()]
    assert len(replaced) >= 8
    with pytest.raises(RuntimeError, match="inside"), without_gpu.megatron_runtime():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
        assert torch.cuda.current_device() == torch.device("cpu")
        assert all(getattr(owner, name) is not original for owner, name, original in replaced)
        raise RuntimeError("inside")
    assert all(getattr(owner, name) is original for owner, name, original in replaced)
    assert torch.zeros(2).type() == "torch.FloatTensor"


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced where there is a GPU")
def test_operations_of_torch_are_left_alone_where_asked():
    with without_gpu.megatron_runtime():
        with without_gpu.operations_of_torch():
            assert torch.zeros(2).type() == "torch.FloatTensor"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"


_STARTS = """
import sys
from megatron_direct.cli.registry import COMMANDS
from megatron_direct.mcore.without_gpu import megatron_runtime

for command in COMMANDS.values():
    command.load()
with megatron_runtime():
    import torch
    from megatron.core.activations import squared_relu
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.models.gpt import gpt_layer_specs

    assert squared_relu(torch.tensor([-1.0, 3.0])).tolist() == [0.0, 9.0]
print(*sorted({"torch._dynamo", "torch._inductor.lowering"} & set(sys.modules)))
assert torch.compile is not None and torch.compile(abs, backend="eager")(torch.tensor(-1.0)) == 1
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced where there is a GPU")
def test_commands_start_without_torchs_compiler():
    started = launching.run([sys.executable, "-W", "ignore", "-c", _STARTS])
    assert started.returncode == 0, started.stderr
    assert started.stdout.split() == []
