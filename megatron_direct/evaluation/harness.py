"""lm-evaluation-harness on a sharded model: its model interface, and its tasks run.

The package ``lm_eval`` is an optional extra and runs on rank 0 alone; what it asks of the model,
all ranks answer (serving.py).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_direct.errors import UserError
from megatron_direct.evaluation.choices import EncodedChoice
from megatron_direct.evaluation.serving import Ask
from megatron_direct.settings import Settings, flag, require_defaults

_AT_ONCE = 512  # texts that are answered between two steps of the progress bar
_RESAMPLES = 1000  # for standard errors that have no formula


@dataclass(frozen=True)
class HarnessConfig(Settings):
    """Tasks of lm-evaluation-harness."""

    lm_eval: tuple = flag((), "tasks of lm-evaluation-harness, which has to be installed "
                          "(the extra `eval`)", nargs="+")
    lm_eval_include_path: str = flag("", "--lm-eval: folder of further task files (YAML)")
    num_fewshot: int | None = flag(
        None, "--lm-eval: examples before each question; default: as the task says", type=int,
        at_least=0)
    limit: int | None = flag(None, "--lm-eval: examples of each task; default: all", type=int,
                             at_least=1)
    confirm_run_unsafe_code: bool = flag(
        False, "--lm-eval: run tasks that execute what the model writes, such as HumanEval; rank 0 "
        "runs it with your rights")

    def check(self) -> None:
        if not self.lm_eval:
            require_defaults(self, "lm_eval", (
                "lm_eval_include_path", "num_fewshot", "limit", "confirm_run_unsafe_code"))


def require_harness() -> None:
    """Raises UserError where lm_eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval needs lm-evaluation-harness, which is not installed: "
                        "pip install 'lm-eval>=0.4.10', the extra `eval` of this package.")


def known_tasks(config: HarnessConfig):
    """lm_eval's TaskManager. Raises UserError for names that it does not have."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=config.lm_eval_include_path or None)
    unknown = [name for name in config.lm_eval if not manager.match_tasks([name])]
    if unknown:
        raise UserError(f"--lm-eval {' '.join(unknown)}: lm-evaluation-harness has no such task. "
                        "Correct the name, or give the folder of its task file with "
                        "--lm-eval-include-path.")
    return manager


def evaluate_tasks(config: HarnessConfig, manager: Any, ask: Ask, tokenizer: Any, seq_length: int,
                   ) -> dict:
    """What lm_eval's simple_evaluate returns (rank 0).

    tokenizer: as preprocessing.tokenizer gives it.
    """
    from lm_eval import simple_evaluate

    # Its bootstrap would fork this process, which has threads of torch and of its process groups.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        found = simple_evaluate(
            model=model_class()(ask, tokenizer, seq_length), tasks=list(config.lm_eval),
            task_manager=manager, num_fewshot=config.num_fewshot, limit=config.limit,
            bootstrap_iters=_RESAMPLES, confirm_run_unsafe_code=config.confirm_run_unsafe_code)
    except ValueError as error:
        _refuse_unsafe_code(error)
        raise
    assert found is not None  # which it is on ranks other than lm_eval's first
    return found


def _refuse_unsafe_code(error: ValueError) -> None:
    """Raises UserError where the harness, or a metric that it loads, will not run a model's code;
    both name what they wait for in their message."""
    if "confirm_run_unsafe_code" in str(error):
        raise UserError(f"a task of --lm-eval runs code that the model writes: {error} With "
                        "this command: add --confirm-run-unsafe-code, where such code can do no "
                        "harm, or leave the task out.") from error
    if "HF_ALLOW_CODE_EVAL" in str(error):
        raise UserError("a task of --lm-eval has the metric code_eval, which runs code that the "
                        "model writes only where the environment variable HF_ALLOW_CODE_EVAL is "
                        "1. Set it and add --confirm-run-unsafe-code, where such code can do no "
                        "harm, or leave the task out.") from error


def model_class() -> type:
    """Made when it is needed: its base is lm_eval's."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class ShardedLM(TemplateLM):
        """Text in, likelihoods and greedy continuations out."""

        def __init__(self, ask: Ask, tokenizer: Any, seq_length: int):
            super().__init__()
            self._ask, self._tokenizer, self.max_length = ask, tokenizer, seq_length

        @property
        def eot_token_id(self) -> int:
            if self._tokenizer.eod is None:
                raise UserError("the tokenizer has no end-of-document token, which lm-evaluation-"
                                "harness puts before a text without a context. Name one with "
                                "--eod-token, or leave out tasks of whole texts.")
            return self._tokenizer.eod

        @property
        def tokenizer_name(self) -> str:
            return type(self._tokenizer).__name__

        def tok_encode(self, string: str, **_kwargs) -> list[int]:
            return self._tokenizer.encode([string])[0].tolist()

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            """As lm_eval has it: behind the context's tokens the continuation's begin. Where the
            tokenizer merges so much that none are left, they begin where the two texts differ."""
            before, scored = super()._encode_pair(context, continuation)
            if not scored:
                alone, whole = map(self.tok_encode, (context, context + continuation))
                before = os.path.commonprefix([alone, whole])
                scored = whole[len(before):]
            return before or [self.prefix_token_id], scored

        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_kwargs):
            """Of ((context, continuation), tokens of the context, tokens of the continuation)."""
            texts = [_scored(context, continuation, self.max_length)
                     for _, context, continuation in requests]
            found: list[tuple[float, bool]] = []
            for start in tqdm(range(0, len(texts), _AT_ONCE), desc="loglikelihood", unit="batch",
                              disable=disable_tqdm):
                answers = self._ask(texts[start: start + _AT_ONCE])
                found += zip(answers.log_likelihoods.tolist(), answers.are_likeliest.tolist(),
                             strict=True)
            return found

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            found = []
            for request in requests:
                text, = request.args
                windows = map(make_disjoint_window, get_rolling_token_windows(
                    token_list=self.tok_encode(text), prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length, context_len=1))
                scores = self._loglikelihood_tokens(
                    [(None, context, scored) for context, scored in windows], disable_tqdm=True)
                found.append(sum(score for score, _ in scores))
            return found

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            wanted = [_Continuation.of(self, *request.args) for request in requests]
            open_ones = list(wanted)
            with tqdm(total=len(wanted), desc="generate", disable=disable_tqdm) as progress:
                while open_ones:
                    answers = self._ask([one.asked(self.max_length) for one in open_ones])
                    for one, token in zip(open_ones, answers.last_tokens.tolist(), strict=True):
                        one.take(token, self._tokenizer)
                    open_ones = [one for one in open_ones if not one.is_done]
                    progress.update(len(wanted) - len(open_ones) - progress.n)
            return [one.text for one in wanted]

    return ShardedLM


def _scored(context: Sequence[int], continuation: Sequence[int], seq_length: int) -> EncodedChoice:
    """The continuation's tokens are scored; the context is cut from the left."""
    if not continuation:
        raise UserError("lm-evaluation-harness asks for the likelihood of a text that is no token "
                        "with this tokenizer. Leave the task out.")
    if len(continuation) > seq_length:
        raise UserError(f"lm-evaluation-harness asks for the likelihood of {len(continuation)} "
                        f"tokens, more than the sequence length of {seq_length}. Leave the task "
                        "out, or load a model with longer sequences.")
    whole = np.array([*context, *continuation], np.int64)
    return EncodedChoice(whole[-(seq_length + 1):], len(continuation),
                         len(whole) > seq_length + 1, False)


class _Continuation:
    """One text that is continued greedily, until one of its stops, or its length, is reached."""

    def __init__(self, tokens: list[int], stops: list[str], limit: int):
        self._tokens, self._stops, self._limit = tokens, stops, limit
        self._new: list[int] = []
        self.text, self.is_done = "", limit == 0

    @classmethod
    def of(cls, model, context: str, settings: dict) -> _Continuation:
        from lm_eval.models.utils import normalize_gen_kwargs

        asked = normalize_gen_kwargs(settings)  # a limit, say, has four names
        if asked["do_sample"] and asked.get("temperature", 1.0) > 0:
            raise UserError("lm-evaluation-harness asks for random samples of text, and only "
                            "greedy continuations are supported. Leave the task out, or set "
                            "do_sample: false in its file.")
        tokens = model.tok_encode(context) or [model.prefix_token_id]
        return cls(tokens, asked["until"], asked["max_gen_toks"])

    def asked(self, seq_length: int) -> EncodedChoice:
        # The label of the last place is not known: any token will do.
        return EncodedChoice(np.array([*self._tokens, *self._new][-seq_length:] + [0], np.int64),
                             1, False, False)

    def take(self, token: int, tokenizer: Any) -> None:
        if token == tokenizer.eod:
            self.is_done = True
            return
        self._new.append(token)
        text = tokenizer.decode(np.array(self._new))
        ends = [text.index(stop) for stop in self._stops if stop and stop in text]
        self.text = text[: min(ends)] if ends else text
        self.is_done = bool(ends) or len(self._new) >= self._limit
