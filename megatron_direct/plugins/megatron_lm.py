"""Sample masks in Megatron-LM's own training loop.

:func:`run_script` runs an entry script of Megatron-LM (``pretrain_gpt.py``) as it is, with two
things changed: the plugin's flags are added to its own, and the datasets that its
``train_valid_test_datasets_provider`` builds are masked. What differs between versions of
Megatron-LM (who parses the flags, in which place ``pretrain`` takes the provider) stays its own
business. Without a mask flag the script runs untouched.

In a script of one's own, use :func:`add_arguments` as ``extra_args_provider``, and
:func:`train_valid_test_datasets_provider` around the provider.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import inspect
import os
import runpy
import sys
from collections.abc import Callable, Iterator

from megatron_direct.data import checks
from megatron_direct.data.blend_plan import BLEND_WEIGHTS, MAX_EPOCHS, BlendPart, BlendRules
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.mask_files import find_mask_files, read_mask_files
from megatron_direct.errors import UserError
from megatron_direct.mcore.blend import is_gpt_dataset, masked_builder, prefixes_of
from megatron_direct.runtime import digests, parallel

_BUILDER = "BlendedMegatronDatasetBuilder"
# The first version that has an entry script, where not all have it.
_SINCE = {"pretrain_hybrid": " 0.18 or later"}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The plugin's flags: an ``extra_args_provider``."""
    group = parser.add_argument_group("sample masks")
    group.add_argument("--sample-mask", nargs=2, action="append", metavar=("PREFIX", "FILE"),
                       help="the mask of one prefix of the blend; may be repeated")
    group.add_argument("--sample-masks", metavar="DIR",
                       help="folder of masks, each named after the last part of its prefix, as "
                            "in RUN_DIR/selections/NAME/masks")
    group.add_argument("--blend-weights", choices=BLEND_WEIGHTS, default="keep",
                       help="with masks: keep the blend's weights, or rescale each to the tokens "
                            "that its mask keeps (default %(default)s)")
    group.add_argument("--max-epochs", type=float, default=MAX_EPOCHS,
                       help="largest number of epochs over a masked prefix; more is an error "
                            "(default %(default)s)")
    return parser


def train_valid_test_datasets_provider(provider: Callable) -> Callable:
    """Megatron-LM's provider, with the masks that the flags name.

    provider: ``(num_samples, vp_stage=None)``, or without ``vp_stage``, that builds its datasets
    with BlendedMegatronDatasetBuilder. Raises UserError on every rank for what cannot be honoured.
    """
    takes_stage = "vp_stage" in inspect.signature(provider).parameters

    def masked(train_val_test_num_samples, vp_stage=None):
        from megatron.training import get_args

        stage = {"vp_stage": vp_stage} if takes_stage else {}
        args = get_args()
        if not args.sample_mask and args.sample_masks is None:
            return provider(train_val_test_num_samples, **stage)
        names = inspect.unwrap(getattr(provider, "func", provider)).__globals__
        if _BUILDER not in names:
            raise UserError(f"{provider.__module__}.{provider.__qualname__} does not build its "
                            f"datasets with {_BUILDER}, where masks are applied. Use "
                            "megatron_direct.MaskedGPTDataset in it.")
        with _replaced(names, _BUILDER, functools.partial(_builder, args)):
            return provider(train_val_test_num_samples, **stage)

    setattr(masked, "is_distributed", True)  # noqa: B010  it is called on all ranks: its builder knows who builds
    return masked


def _builder(args, dataset_class, sizes, is_built_on_rank, config):
    """Stands in for BlendedMegatronDatasetBuilder while the provider runs."""
    if not is_gpt_dataset(dataset_class):
        raise UserError(f"sample masks are for GPT pre-training data, but the flags ask for "
                        f"{dataset_class.__name__} (--mock-data, --sft, --fim-data). Leave out "
                        "either.")
    masks, consumed = _load_masks(args, config), _num_consumed(args)
    builder, parts = masked_builder(
        sizes, is_built_on_rank, config, masks,
        BlendRules(args.blend_weights, args.max_epochs), consumed)
    for part in parts:
        parallel.say(f"> {part}")
        missed = what_is_missed(part, (sizes[0] - consumed) / sizes[0]) if consumed else ""
        if missed:
            parallel.say(f"> WARNING: {missed}")
    return builder


def what_is_missed(part: BlendPart, share: float) -> str:
    """Words for selected documents that go unseen, where Megatron-LM shuffles several epochs
    together and reads the last ``share`` of the sequences only; none for less than a hundredth, and
    where nothing is left to read."""
    if not part.masked or share <= 0:
        return ""
    epochs = part.epochs / share  # of the whole run
    unseen = (1 - share) ** epochs
    if epochs <= 1 or unseen < 0.01:
        return ""
    return (f"{part.prefix}: the index is of the whole run, {epochs:.1f} epochs shuffled together, "
            f"of which the last {share:.0%} are read: about {unseen:.0%} of the selected documents "
            "will not be seen, and others more than once. Give --phase-transition-iterations with "
            "the iteration at which the blend changes, and the schedule in samples "
            "(--train-samples), as docs/blends.md says.")


def _load_masks(args, config) -> dict[str, SampleMask]:
    """Files are located on rank 0; every rank reads them."""
    def find():
        prefixes = prefixes_of(config)
        model = getattr(args, "tokenizer_model", None)
        digest = digests.file_digest(model) if model and os.path.isfile(model) else None
        checks.require_one_vocabulary(prefixes, config.tokenizer.vocab_size, digest)
        return find_mask_files(prefixes, args.sample_mask or (), args.sample_masks)

    masks = read_mask_files(parallel.on_rank_zero(find))
    found = ", ".join(f"{prefix}: {mask.digest}" for prefix, mask in masks.items())
    parallel.require_same_on_all_ranks(found, "digests of the masks")
    return masks


def _num_consumed(args) -> int:
    """Sequences that Megatron-LM skips because a checkpoint has consumed them.

    With ``--phase-transition-iterations`` a phase begins at its blend's first sequence, so that all
    that was asked for belongs to this blend; without, Megatron-LM starts a new blend where the old
    one stopped.
    """
    return 0 if getattr(args, "phase_transition_iterations", None) else args.consumed_train_samples


def run_script(script: str = "pretrain_gpt",
        instead: Callable[[Callable], Callable] = lambda pretrain: pretrain) -> None:
    """Runs ``script``.py of the Megatron-LM on the Python path, as if it had been started itself.

    instead: makes, out of ``megatron.training.pretrain``, what the script is to call for it.
    """
    try:
        with _entry_script(script, instead) as path:
            runpy.run_path(path, run_name="__main__")
    except UserError as error:
        parallel.speak_once(f"megatron-direct: error: {error}")
        sys.exit(1)


@contextlib.contextmanager
def _entry_script(script: str, instead: Callable[[Callable], Callable]) -> Iterator[str]:
    """The path of an entry script that has the plugin's flags and masks for as long as it runs."""
    spec = importlib.util.find_spec(script)
    if spec is None or importlib.util.find_spec("megatron.training") is None:
        since = _SINCE.get(script, "")
        raise UserError(f"{script}.py and megatron.training are not on the Python path. Put a "
                        f"checkout of Megatron-LM{since} there: PYTHONPATH=/path/to/Megatron-LM.")
    import megatron.training
    from megatron.training import arguments

    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(vars(megatron.training), "pretrain",
                                      with_masks(instead(megatron.training.pretrain))))
        if hasattr(arguments, "parse_and_validate_args"):  # since 0.18 the script parses
            stack.enter_context(_replaced(vars(arguments), "parse_and_validate_args",
                                          _with_arguments(arguments.parse_and_validate_args)))
        yield str(spec.origin)


def with_masks(pretrain: Callable) -> Callable:
    """``megatron.training.pretrain`` of any version, over masked datasets."""
    signature = inspect.signature(pretrain)

    @functools.wraps(pretrain)
    def masked(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        name = "train_valid_test_dataset_provider"
        given.arguments[name] = train_valid_test_datasets_provider(given.arguments[name])
        if "extra_args_provider" in signature.parameters:  # up to 0.17 pretrain parses
            given.arguments["extra_args_provider"] = _chained(
                given.arguments["extra_args_provider"])
        return pretrain(*given.args, **given.kwargs)

    return masked


def _with_arguments(parse: Callable) -> Callable:
    @functools.wraps(parse)
    def parse_more(extra_args_provider=None, *args, **kwargs):
        return parse(_chained(extra_args_provider), *args, **kwargs)

    return parse_more


def _chained(extra_args_provider: Callable | None) -> Callable:
    return lambda parser: add_arguments(extra_args_provider(parser) if extra_args_provider
                                        else parser)


@contextlib.contextmanager
def _replaced(names: dict, name: str, value) -> Iterator[None]:
    original = names[name]
    names[name] = value
    try:
        yield
    finally:
        names[name] = original
