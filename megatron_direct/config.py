"""How a model is run and trained: groups of flags that several commands share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from megatron_direct import hybrid_pattern
from megatron_direct.architecture import ModelConfig, ffn_hidden_size
from megatron_direct.errors import UserError
from megatron_direct.settings import Settings, flag, flag_name


@dataclass(frozen=True)
class ParallelConfig(Settings):
    """Parallelism, and by whose layers. Ranks that the sizes leave over are data parallel."""

    tensor_model_parallel_size: int = flag(1, "ranks that share each layer", at_least=1)
    pipeline_model_parallel_size: int = flag(1, "pipeline stages", at_least=1)
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "layers per model chunk in the interleaved pipeline schedule", type=int, at_least=1)
    sequence_parallel: bool = flag(
        False, "split norms and residuals over the tensor-parallel ranks along the sequence")
    distributed_timeout_minutes: int = flag(
        10, "minutes that a collective waits for a lost rank", at_least=1)
    distributed_backend: str | None = flag(
        None, "what carries collectives; default: nccl where there is a GPU, else gloo. On GPUs "
        "gloo is for trying tensor parallelism on a single one (docs/launching.md)",
        type=str, choices=("nccl", "gloo"))
    expert_model_parallel_size: int = flag(
        1, "data-parallel ranks that share one set of experts", at_least=1)
    moe_token_dispatcher_type: str = flag(
        "allgather", "how tokens reach experts on other ranks: gathered on all ranks (allgather), "
        "or sent where needed (alltoall: less memory, needs a GPU)",
        choices=("allgather", "alltoall"))
    context_parallel_size: int = flag(
        1, "ranks that share each sequence; only 1 is supported", at_least=1)
    transformer_impl: str = flag(
        "local", "whose layers: Megatron's own (local), or Transformer Engine's, where it is "
        "installed; exact curvature products always take Megatron's own",
        choices=("local", "transformer_engine"))

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)

    def require_fits(self, model: ModelConfig, world_size: int) -> None:
        """Raises UserError where the layout does not divide the ranks, or the model."""
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        if world_size % (tp * pp):
            raise UserError(
                f"--tensor-model-parallel-size {tp} times --pipeline-model-parallel-size {pp} "
                f"needs a multiple of {tp * pp} ranks, but {world_size} were started. "
                "Change the sizes, or torchrun's --nproc-per-node.")
        if self.context_parallel_size != 1:
            raise UserError(
                f"--context-parallel-size {self.context_parallel_size} is not supported: the "
                "attention of Megatron's local layer spec needs whole sequences. Split long "
                "sequences with --sequence-parallel and --tensor-model-parallel-size.")
        self._check_experts(model, world_size)
        for name, value in _divided_by_tensor_ranks(model):
            if value % tp:
                raise UserError(
                    f"--tensor-model-parallel-size {tp} does not divide the model's {name} "
                    f"{value}. Choose a size that divides it.")
        for name in ("num_experts", "multi_latent_attention"):
            if getattr(model, name) and tp > 1 and not self.sequence_parallel:
                # Megatron trains no experts otherwise, and doubles gradients of latent norms.
                raise UserError(f"{flag_name(name)} with --tensor-model-parallel-size {tp} needs "
                                "--sequence-parallel.")
        if self.sequence_parallel and (tp == 1 or model.seq_length % tp):
            raise UserError(
                f"--sequence-parallel splits --seq-length {model.seq_length} over "
                f"--tensor-model-parallel-size {tp}: the size must be at least 2 and divide it.")
        if self.transformer_impl == "transformer_engine":
            _require_layers_of_transformer_engine(model)
        chunk = self.num_layers_per_virtual_pipeline_stage
        if chunk is not None and pp == 1:
            raise UserError(
                "--num-layers-per-virtual-pipeline-stage needs "
                "--pipeline-model-parallel-size of at least 2.")
        if model.mtp_num_layers and pp > 1 and not model.untie_embeddings_and_output_weights:
            # Megatron makes an output layer of its own for the last stage, and then refuses it.
            raise UserError(
                f"--mtp-num-layers {model.mtp_num_layers} with --pipeline-model-parallel-size {pp} "
                "needs --untie-embeddings-and-output-weights. Use other sizes, or leave the heads "
                "out with --mtp-num-layers 0.")
        if model.num_layers % (pp * (chunk or 1)):
            raise UserError(
                f"--num-layers {model.num_layers} cannot be split evenly over "
                f"--pipeline-model-parallel-size {pp}"
                + (f" in chunks of {chunk} layers." if chunk else ".")
                + " Choose sizes that divide it.")

    def _check_experts(self, model: ModelConfig, world_size: int) -> None:
        size = self.expert_model_parallel_size
        copies = self.data_parallel_size(world_size)
        if copies % size:
            raise UserError(
                f"--expert-model-parallel-size {size} does not divide the {copies} data-parallel "
                "ranks, over which experts are distributed. Choose a size that divides them.")
        if size > 1 and (model.num_experts is None or model.num_experts % size):
            raise UserError(f"--expert-model-parallel-size {size} does not divide --num-experts "
                            f"{model.num_experts}. Choose a size that divides it.")

    def num_model_chunks(self, model: ModelConfig) -> int:
        """Model chunks on each rank (1 without the interleaved schedule)."""
        chunk = self.num_layers_per_virtual_pipeline_stage
        return model.num_layers // (self.pipeline_model_parallel_size * chunk) if chunk else 1


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """Optimizer and schedule. The learning rate decays in the annealing only."""

    lr: float = flag(2e-3, "learning rate of the stable phase", above=0, at_most=1e6)
    min_lr: float = flag(0.0, "learning rate at the end of the annealing", at_least=0, at_most=1e6)
    lr_warmup_iters: int = flag(
        20, "iterations of linear warm-up at the start of pre-training", at_least=0)
    lr_wsd_decay_style: str = flag(
        "linear", "shape of the decay",
        choices=("linear", "cosine", "exponential", "minus_sqrt"))
    weight_decay: float = flag(0.1, "decoupled weight decay", at_least=0, at_most=1e6)
    adam_beta1: float = flag(0.9, "decay of Adam's first moment", at_least=0, below=1)
    adam_beta2: float = flag(0.95, "decay of Adam's second moment", at_least=0, below=1)
    adam_eps: float = flag(1e-8, "Adam's epsilon", above=0, at_most=1e6)
    clip_grad: float = flag(1.0, "largest norm of the gradient; 0: no clipping", at_least=0)
    use_distributed_optimizer: bool = flag(
        False, "shard the optimizer's state over the data-parallel ranks")


@dataclass(frozen=True)
class BatchConfig(Settings):
    """Batches."""

    micro_batch_size: int = flag(8, "sequences per rank in one pass", at_least=1)
    global_batch_size: int = flag(16, "sequences per optimizer step, over all ranks", at_least=1)
    seed: int = flag(
        1234, "seed of initial weights and of the order of the data", at_least=0, at_most=2**32 - 1)

    def num_microbatches(self, data_parallel_size: int) -> int:
        at_once = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % at_once:
            raise UserError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of "
                f"--micro-batch-size {self.micro_batch_size} times {data_parallel_size} "
                "data-parallel ranks. Change either.")
        return self.global_batch_size // at_once


def _require_layers_of_transformer_engine(model: ModelConfig) -> None:
    for name in ("multi_latent_attention", "hybrid_layer_pattern"):
        if getattr(model, name):
            raise UserError(f"--transformer-impl transformer_engine does not support "
                            f"{flag_name(name)}. Use --transformer-impl local.")


def _divided_by_tensor_ranks(model: ModelConfig) -> Iterator[tuple[str, int]]:
    """(name, value) of every size of the model that tensor parallelism divides."""
    yield "--num-attention-heads", model.num_attention_heads
    yield "padded vocabulary", model.padded_vocab_size
    if model.multi_latent_attention:
        yield "--q-lora-rank", model.q_lora_rank or 0
        yield ("--kv-lora-rank plus --qk-pos-emb-head-dim",
               model.kv_lora_rank + model.qk_pos_emb_head_dim)
    else:
        yield "--num-query-groups", model.num_query_groups or model.num_attention_heads
    if hybrid_pattern.MAMBA in (model.hybrid_layer_pattern or ""):
        yield "--mamba-num-heads", hybrid_pattern.mamba_heads(model)
        yield "--mamba-num-groups", model.mamba_num_groups
    yield "--ffn-hidden-size", ffn_hidden_size(model)
    yield "--moe-ffn-hidden-size", model.moe_ffn_hidden_size or 0
    yield ("--moe-shared-expert-intermediate-size",
           model.moe_shared_expert_intermediate_size or 0)


@dataclass(frozen=True)
class Precision(Settings):
    """Number formats.

    As Megatron trains in bfloat16: main parameters, the optimizer's state, the reduction of
    gradients, softmax and losses stay in float32, and so do sums of sketches and vectors over the
    parameters.
    """

    bf16: bool = flag(False, "weights and activations in bfloat16 instead of float32")


@dataclass(frozen=True)
class Execution(Settings):
    """Execution.

    Losses stay the same but for rounding, so that what a run depends on (its keys) has none of it.
    """

    torch_compile: bool = flag(
        False, "train with layers compiled by torch.compile: the first iteration takes a minute "
        "or more longer, the others about a tenth less on a CPU, which pays from some hundred "
        "iterations on; layers with experts, and what cannot be compiled, run as they are")


@dataclass(frozen=True)
class Job:
    """A model and how it runs: what it is, on which ranks, how it is trained, in what numbers."""

    model: ModelConfig
    layout: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    precision: Precision = field(default_factory=Precision)
    execution: Execution = field(default_factory=Execution)

    @property
    def num_model_chunks(self) -> int:
        """On each rank; 1 without the interleaved schedule."""
        return self.layout.num_model_chunks(self.model)

    @property
    def of_main_loss(self) -> Job:
        """The same without heads for multi-token prediction: what has gradients of samples."""
        return replace(self, model=replace(self.model, mtp_num_layers=0))

    def require_runs_on(self, world_size: int, *, trains: bool) -> None:
        """Raises UserError where so many ranks cannot hold the model, or, if it ``trains``, cannot
        divide its batches."""
        self.layout.require_fits(self.model, world_size)
        if trains:
            self.batch.num_microbatches(self.layout.data_parallel_size(world_size))


@dataclass(frozen=True)
class Given:
    """Flags that were given, where the rest comes from a checkpoint: by group, name and value."""

    model: Mapping[str, object] = field(default_factory=dict)
    optimizer: Mapping[str, object] = field(default_factory=dict)
    batch: Mapping[str, object] = field(default_factory=dict)
    precision: Mapping[str, object] = field(default_factory=dict)
