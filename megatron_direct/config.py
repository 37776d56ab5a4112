"""What a user sets: frozen dataclasses of plain values, and the flags made from them.

A field is a flag: ``num_layers`` is ``--num-layers``, named as Megatron-LM names it where
Megatron-LM has it. Flags carry no defaults of their own (``argparse.SUPPRESS``), so that a value
that was given can be told from one that was not; :func:`from_flags` fills in the dataclass's.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field, fields

from megatron_direct.errors import UserError


def flag(default, help: str, *, choices=None, nargs=None, type=None, required=False):
    """A dataclass field with what argparse has to know of it."""
    metadata = {"help": help, "choices": choices, "nargs": nargs, "type": type,
                "required": required}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """Architecture. The defaults are the embedded model: 1.3 M parameters, minutes on a CPU."""

    num_layers: int = flag(4, "transformer layers")
    hidden_size: int = flag(128, "width of the residual stream")
    ffn_hidden_size: int | None = flag(
        None, "width of the MLP; left out: 8/3 of the hidden size with --swiglu, else 4 times",
        type=int)
    num_attention_heads: int = flag(4, "attention heads")
    num_query_groups: int | None = flag(
        None, "key and value heads of grouped-query attention; left out: one a head", type=int)
    seq_length: int = flag(256, "tokens of a training sequence; longer samples are cut")
    max_position_embeddings: int | None = flag(
        None, "positions the model can tell apart; left out: --seq-length", type=int)
    normalization: str = flag("RMSNorm", "kind of norm", choices=("RMSNorm", "LayerNorm"))
    swiglu: bool = flag(True, "gated SiLU in the MLP; --no-swiglu: GELU")
    add_bias_linear: bool = flag(False, "biases in linear layers")
    position_embedding_type: str = flag(
        "rope", "position embedding", choices=("rope", "learned_absolute", "none"))
    rotary_base: int = flag(10000, "base of the rotary embedding")
    rotary_percent: float = flag(1.0, "share of each head that is rotated")
    untie_embeddings_and_output_weights: bool = flag(
        False, "an output layer with weights of its own")
    vocab_size: int | None = flag(
        None, "entries of the tokenizer; left out: as the datasets say (PREFIX.json)", type=int)
    make_vocab_size_divisible_by: int = flag(
        128, "the vocabulary is padded to a multiple of this, whatever the layout")
    init_method_std: float = flag(0.02, "standard deviation of initial weights")

    def __post_init__(self):
        _require_positive(self, "num_layers", "hidden_size", "num_attention_heads", "seq_length",
                          "make_vocab_size_divisible_by")
        _require_divides(self, "num_attention_heads", "hidden_size")
        if self.num_query_groups is not None:
            _require_divides(self, "num_query_groups", "num_attention_heads")

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over ranks; what is left of the ranks is data parallel."""

    tensor_model_parallel_size: int = flag(1, "ranks that share each layer")
    pipeline_model_parallel_size: int = flag(1, "pipeline stages")
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "layers of a model chunk in the interleaved pipeline schedule", type=int)
    sequence_parallel: bool = flag(
        False, "spread norms and residuals over the tensor-parallel ranks by sequence")
    distributed_timeout_minutes: int = flag(10, "how long a collective may wait for a lost rank")

    def check(self, model: ModelConfig, world_size: int) -> None:
        """Raises UserError where the layout divides neither the ranks nor the model."""
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        if tp < 1 or pp < 1:
            raise UserError(
                f"--tensor-model-parallel-size {tp} and --pipeline-model-parallel-size {pp} "
                "must be at least 1.")
        if world_size % (tp * pp):
            raise UserError(
                f"--tensor-model-parallel-size {tp} times --pipeline-model-parallel-size {pp} "
                f"needs a multiple of {tp * pp} ranks, but {world_size} were started. "
                "Change the sizes, or --nproc-per-node of torchrun.")
        groups = model.num_query_groups or model.num_attention_heads
        for name, value in (("--num-attention-heads", model.num_attention_heads),
                            ("--num-query-groups", groups),
                            ("--ffn-hidden-size", ffn_hidden_size(model)),
                            ("padded vocabulary", model.padded_vocab_size)):
            if value % tp:
                raise UserError(
                    f"--tensor-model-parallel-size {tp} does not divide the model's {name} "
                    f"{value}. Choose a size that divides it.")
        if self.sequence_parallel and (tp == 1 or model.seq_length % tp):
            raise UserError(
                f"--sequence-parallel spreads --seq-length {model.seq_length} over "
                f"--tensor-model-parallel-size {tp}: the size must be at least 2 and divide it.")
        chunk = self.num_layers_per_virtual_pipeline_stage
        if chunk is not None and pp == 1:
            raise UserError(
                "--num-layers-per-virtual-pipeline-stage needs "
                "--pipeline-model-parallel-size of at least 2.")
        if model.num_layers % (pp * (chunk or 1)):
            raise UserError(
                f"--num-layers {model.num_layers} cannot be split evenly over "
                f"--pipeline-model-parallel-size {pp}"
                + (f" in chunks of {chunk} layers." if chunk else ".")
                + " Choose sizes that divide it.")

    def num_model_chunks(self, model: ModelConfig) -> int:
        """Model chunks on each rank (1 without the interleaved schedule)."""
        chunk = self.num_layers_per_virtual_pipeline_stage
        return model.num_layers // (self.pipeline_model_parallel_size * chunk) if chunk else 1


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam and its schedule, with Megatron's names; learning rates decay in the annealing only."""

    lr: float = flag(2e-3, "learning rate of the stable phase")
    min_lr: float = flag(0.0, "learning rate at the end of the annealing")
    lr_warmup_iters: int = flag(20, "iterations of linear warm-up at the start of pre-training")
    lr_wsd_decay_style: str = flag(
        "linear", "form of the decay",
        choices=("linear", "cosine", "exponential", "minus_sqrt"))
    weight_decay: float = flag(0.1, "decoupled weight decay")
    adam_beta1: float = flag(0.9, "decay of Adam's first moment")
    adam_beta2: float = flag(0.95, "decay of Adam's second moment")
    adam_eps: float = flag(1e-8, "Adam's epsilon")
    clip_grad: float = flag(1.0, "largest norm of a gradient; 0: no clipping")
    use_distributed_optimizer: bool = flag(
        False, "spread the optimizer's state over the data-parallel ranks")


@dataclass(frozen=True)
class BatchConfig:
    """Batches, in sequences."""

    micro_batch_size: int = flag(8, "sequences a rank computes at once")
    global_batch_size: int = flag(16, "sequences of one optimizer step, over all ranks")
    seed: int = flag(1234, "seed of initial weights and of the order of the data")

    def num_microbatches(self, data_parallel_size: int) -> int:
        at_once = self.micro_batch_size * data_parallel_size
        if self.micro_batch_size < 1 or self.global_batch_size % at_once:
            raise UserError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of "
                f"--micro-batch-size {self.micro_batch_size} times {data_parallel_size} "
                "data-parallel ranks. Change either.")
        return self.global_batch_size // at_once


def ffn_hidden_size(model: ModelConfig) -> int:
    """Width of the MLP: as given, or 4 h; with a gate 8/3 h (equal parameters), in steps of 64."""
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    if not model.swiglu:
        return 4 * model.hidden_size
    return -(-8 * model.hidden_size // (3 * 64)) * 64


def add_flags(parser: argparse.ArgumentParser, *configs: type) -> None:
    """One argument group for each dataclass, titled by the first line of its docstring.

    A flag that two dataclasses share (--seed) is one flag, and fills both.
    """
    known: set[str] = set()
    for config in configs:
        group = parser.add_argument_group(config.__doc__.splitlines()[0].rstrip("."))
        for f in fields(config):
            if f.name not in known:
                _add_flag(group, f)
                known.add(f.name)


def from_flags(config: type, arguments: argparse.Namespace):
    """The dataclass with the values that were given on the command line."""
    given = vars(arguments)
    return config(**{f.name: given[f.name] for f in fields(config) if f.name in given})


def given_flags(config: type, arguments: argparse.Namespace) -> dict:
    """Only the values that were given on the command line."""
    return {f.name: getattr(arguments, f.name) for f in fields(config)
            if hasattr(arguments, f.name)}


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def _add_flag(group, f: dataclasses.Field) -> None:
    meta = f.metadata
    common = {"dest": f.name, "default": argparse.SUPPRESS}
    if isinstance(f.default, bool):
        action = argparse.BooleanOptionalAction
        group.add_argument(flag_name(f.name), action=action, help=meta["help"], **common)
        return
    help_text = meta["help"]
    if f.default not in (None, dataclasses.MISSING, ()):
        help_text += f" (default {f.default})".replace("%", "%%")
    kind = meta["type"] or (type(f.default) if f.default is not None else str)
    group.add_argument(flag_name(f.name), type=str if kind is tuple else kind,
                       choices=meta["choices"], nargs=meta["nargs"], required=meta["required"],
                       help=help_text, **common)


def _require_positive(config, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{flag_name(name)} is {getattr(config, name)}; it must be at least 1.")


def _require_divides(config, divisor: str, name: str) -> None:
    small, large = getattr(config, divisor), getattr(config, name)
    if small < 1 or large % small:
        raise UserError(
            f"{flag_name(divisor)} {small} does not divide {flag_name(name)} {large}.")
