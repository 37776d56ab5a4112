"""What a pass over the model costs a rank: on a machine of known terms, or as it was measured.

A *pass* is forward and backward over a micro-batch. Its terms, each of them per rank:

    products    multiply-adds of linear layers and attention, at the rate of large products
    elements    what norms, activations and residuals read and write, per token, layer and width
    launches    what the host takes for a layer, while the device works: the longer of both counts
    gathers     columns of factors gathered into their buckets, per token (a sketch alone)
    frames      k x k multiply-adds, per token and linear layer (a sketch alone)
    messages    of tensor, pipeline and expert parallel ranks

A training pass has three products for a weight (forward, input's gradient, weight's gradient), a
sketch two: it never forms a weight's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_direct.architecture import ModelConfig
from megatron_direct.config import ParallelConfig
from megatron_direct.steps.model_size import ModelSize, head_size_of, size_of

GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """Terms of one rank (one GPU, or one process on CPU cores) and of what joins ranks; rates in
    units per second.

    flops, elements, launches, gathers, frames: of passes, as above. memory: bytes of the device;
    host_memory: of a node. fabric: bytes that a rank sends between nodes, node_links: within one.
    storage: bytes that all ranks together write to the shared file system. solver: entries of a row
    that a rank takes through the whole solver; leader: samples that its leader does; planner:
    candidates that are planned for, masked and blended. start: seconds until Python, Megatron and
    the collectives are there; base: bytes of host memory that a rank has by then. cores_per_rank:
    below 1 where ranks of one thread share cores, which their passes' times know nothing of.
    """

    name: str
    flops: float
    elements: float
    launches: float
    gathers: float
    frames: float
    memory: float
    host_memory: float
    ranks_per_node: int
    fabric: float
    node_links: float
    storage: float
    solver: float
    leader: float
    planner: float
    start: float
    base: float
    cores_per_rank: float = 1.0


# Passes: from benchmarks/RESULTS.md (bfloat16, without Transformer Engine), the rate of products
# held at 95 % of what a product of 8192 x 8192 x 8192 reaches: elements from the training pass of
# 15 layers of Llama 3 8B's, launches from that of GPT-2 Medium's shape, frames from what a profile
# of its sketch says of their products, gathers from what hashing takes in the other beside them.
# A check that the fit did not see: passes without weight gradients, 220 and 80 ms by these terms,
# 213 and 78 measured. Links, memory and storage are the vendor's figures for a
# DGX H100 (900 GB/s NVLink both ways, 400 Gb/s InfiniBand a GPU) and one parallel file system of
# 20 GB/s: not measured. Planner: make bench-scale; solver and leader: what 4000 more rows of 2048
# and 10^5 more rows of 8 took of one CPU core's time; start and base: not measured there.
H100 = Machine(
    name="h100", flops=750e12, elements=8.95e9, launches=237.0, gathers=1.2e12, frames=3.8e14,
    memory=80e9, host_memory=2e12, ranks_per_node=8, fabric=50e9, node_links=450e9, storage=20e9,
    solver=2.0e6, leader=3.3e4, planner=5e6, start=30.0, base=0.6e9)


@dataclass(frozen=True)
class PassSetup:
    """micro_batch_size samples of ``length`` tokens (their mean), of at most ``longest``, on the
    ranks of a layout, in bfloat16 or float32, sketched to ``sketch_size``."""

    layout: ParallelConfig
    micro_batch_size: int
    length: float
    longest: int
    bf16: bool
    sketch_size: int

    @property
    def tokens(self) -> float:
        return self.micro_batch_size * self.length


@dataclass(frozen=True)
class PassCost:
    """Of one micro-batch on one rank. training, sketch: seconds of a pass, messages apart;
    messages: seconds of them in either; sent: bytes of them; held: bytes of activations and of what
    a pass works with, of the longest samples; weights: parameters of a rank."""

    training: float
    sketch: float
    messages: float
    sent: float
    held: float
    weights: float


# Of what the host takes for a layer, in a sketch: GPT-2 Medium's 151 ms, where training takes 101.
_HOST_OF_SKETCH = 1.5


def pass_cost(machine: Machine, size: ModelSize, shape: PassSetup) -> PassCost:
    layout = shape.layout
    tensor, stages = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    ranks, tokens = tensor * stages, shape.tokens
    linear = (size.multiply_adds + size.head) * tokens / ranks
    # A query sees half of the keys; its backward pass computes the scores again.
    scores = size.attention_width * tokens * shape.length / 2 / ranks
    products = 2 * linear / machine.flops  # of one product for each weight
    attention = 3.5 * 2 * scores / machine.flops
    elements = size.num_layers * size.hidden_size * tokens / ranks / machine.elements
    launches = size.num_layers / stages / machine.launches
    common = attention + elements
    hashing = tokens / ranks * (size.columns / machine.gathers
                                + size.linears * shape.sketch_size**2 / machine.frames)
    sent, messages = _messages(machine, size, shape)
    return PassCost(max(3 * products + common, launches),
                    max(2 * products + common + hashing, _HOST_OF_SKETCH * launches),
                    messages, sent, _held(size, shape), _weights(size, layout))


def _weights(size: ModelSize, layout: ParallelConfig) -> float:
    """The most parameters that a rank holds: of a stage with the embeddings."""
    tensor, stages = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    layers = size.dense / stages + size.experts / stages / layout.expert_model_parallel_size
    return (layers + (size.embeddings if stages == 1 else size.head)) / tensor


def with_prediction_heads(one: PassCost, model: ModelConfig, layout: ParallelConfig) -> PassCost:
    """A pass in training: heads of multi-token prediction take part, all of them on the last stage,
    whose rank is the one that counts."""
    heads = model.mtp_num_layers or 0
    if not heads:
        return one
    size, head = size_of(model), head_size_of(model)
    stages, tensor = layout.pipeline_model_parallel_size, layout.tensor_model_parallel_size
    of_pass = heads * head.multiply_adds / (size.multiply_adds + size.head)
    weights = head.dense + head.experts / layout.expert_model_parallel_size
    return replace(
        one, training=one.training * (1 + stages * of_pass), held=one.held * (1 + of_pass),
        weights=one.weights + weights / tensor * (1 if model.mtp_use_repeated_layer else heads))


# Bytes of activations per token, layer and width in bfloat16, and of logits per token and entry of
# the vocabulary: from the peaks of the two sketches in benchmarks/RESULTS.md. Under tensor
# parallelism the loss is Megatron's, with copies of the logits in float32.
_ACTIVATION_BYTES, _LOGIT_BYTES, _LOGIT_BYTES_OF_MEGATRON = 38.4, 2.8, 12.0


def _held(size: ModelSize, shape: PassSetup) -> float:
    layout = shape.layout
    tensor, stages = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    tokens = shape.micro_batch_size * shape.longest
    # Each stage keeps what is under way: as many micro-batches as there are stages, of 1 / stages
    # of the layers. Without sequence parallelism norms and residuals are whole on each rank.
    divided = 1 / tensor if layout.sequence_parallel or tensor == 1 else 0.3 + 0.7 / tensor
    activations = tokens * size.num_layers * size.hidden_size * _ACTIVATION_BYTES * divided
    logits = tokens * size.vocab_size * (
        _LOGIT_BYTES if tensor == 1 else _LOGIT_BYTES_OF_MEGATRON / tensor)
    frames = 4.0 * shape.sketch_size**2 * shape.micro_batch_size
    return (activations + logits) * (1 if shape.bf16 else 2) + frames * min(stages, 4)


def _messages(machine: Machine, size: ModelSize, shape: PassSetup) -> tuple[float, float]:
    """(bytes that a rank sends, seconds of it) in one pass."""
    layout, number = shape.layout, 2 if shape.bf16 else 4
    tensor, stages = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    activation = shape.tokens * size.hidden_size * number
    # Two sums a layer, each way; a ring moves twice what is summed, less a share.
    of_tensor = 4 * 2 * (tensor - 1) / tensor * activation * size.num_layers / stages
    of_stages = 2 * activation / tensor if stages > 1 else 0.0
    of_sketches = 4.0 * shape.micro_batch_size * shape.sketch_size * (tensor * stages > 1) * 2
    expert = layout.expert_model_parallel_size
    of_experts = 0.0
    if expert > 1:  # there and back, forward and backward, to each expert of a token
        of_experts = 4 * activation * (expert - 1) / expert * size.expert_uses / stages / tensor
    within = machine.node_links if tensor <= machine.ranks_per_node else machine.fabric
    among = machine.node_links if expert * tensor <= machine.ranks_per_node else machine.fabric
    seconds = of_tensor / within + of_experts / among + (of_stages + of_sketches) / machine.fabric
    return of_tensor + of_stages + of_sketches + of_experts, seconds
