"""The model ``longscan`` of lm-evaluation-harness.

It is registered by importing this module. Versions of the harness that look for plug-ins (the entry points
``lm_eval.models``) do that by themselves, so that its own command knows the model:

    lm_eval --model longscan --model_args pretrained=FOLDER --tasks hellaswag

0.4.13 and earlier look for none; their command, with all options of its own, is run through this module:

    python -m longscan.integrations.lm_eval --model longscan --model_args pretrained=FOLDER --tasks hellaswag
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

try:
    import lm_eval.models  # noqa: F401 (the harness fills its registry only while that is empty)
except ImportError as error:
    raise ImportError(f"lm-evaluation-harness: {error}; install it with: pip install 'longscan[lm-eval]'") from error
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from longscan.errors import ArgumentError, ConfigError
from longscan.evaluation.scoring import score_continuations
from longscan.models import LanguageModel
from longscan.models.pretrained import CONFIG_FILE, find_folder
from longscan.tasks.tokenizers import BYTES, TOKENIZER_FILE, Tokenizer, load_tokenizer

# The models that mamba-ssm released have this one, of so many tokens, and do not say so.
_RELEASED_TOKENIZER, _RELEASED_VOCABULARY = "EleutherAI/gpt-neox-20b", 50277
_GENERATED_ROWS = 32
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@register_model("longscan")
class LongscanLM(TemplateLM):
    """A longscan language model, as the harness sees it.

    Args:
        pretrained: a folder or a name on the Hub, as for :meth:`LanguageModel.from_pretrained`, or a model.
        tokenizer: "bytes", a ``tokenizer.json``, a folder with one, a name on the Hub, or a tokenizer of
            :mod:`longscan.tasks.tokenizers`; default: the model's own, and GPT-NeoX's for mamba-ssm's models.
        dtype: "auto" (as saved), "float32", "bfloat16", "float16" or "float64".
        weights: "saved", or "int8" to quantise them (:meth:`LanguageModel.quantize`); ``dtype`` is then that of the
            activations, "auto" float32.
        device: default: the GPU, if there is one.
        max_length: longest context; longer ones lose tokens on the left, and documents are scored window by window,
            as the harness does for all models. None: nothing is cut, the state is carried through.
        tokens_per_pass: most tokens taken through the model at once. It bounds memory and changes no result.
        batch_size: most sequences of a pass. "auto", and 1, which is what the harness says by default, leave it to
            ``tokens_per_pass``.
        prefix_token_id: the token before a document; default: the tokenizer's border between documents.
        add_bos_token: put it before every context too.
        revision: of the repository on the Hub.
        subfolder: where in the folder or the repository the model is.

    Raises:
        ArgumentError: an option outside its range, or no tokenizer is known.
        CheckpointError: the model cannot be read.
        DataError: the tokenizer cannot be read.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel,
        *,
        tokenizer: str | Tokenizer | None = None,
        dtype: str = "auto",
        weights: str = "saved",
        device: str | None = None,
        max_length: int | None = 2048,
        tokens_per_pass: int = 8192,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        prefix_token_id: int | None = None,
        add_bos_token: bool = False,
        revision: str | None = None,
        subfolder: str = "",
    ) -> None:
        super().__init__()
        if dtype != "auto" and dtype not in _DTYPES:
            raise ArgumentError(f"dtype must be auto or one of {', '.join(_DTYPES)}; got {dtype!r}")
        if max_length is not None and max_length < 1:
            raise ArgumentError(f"max_length must be at least 1, or None for no bound; got {max_length}")
        if isinstance(pretrained, LanguageModel):
            model = pretrained
        else:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            model = LanguageModel.from_pretrained(pretrained, device=device, revision=revision, subfolder=subfolder)
        if weights != "saved":
            model.quantize(weights)
        self._model = model.eval() if dtype == "auto" else model.eval().to(_DTYPES[dtype])
        self._device = model.device
        if tokenizer is None:
            tokenizer = _tokenizer_of(pretrained, model, revision, subfolder)
        self._tokenizer: Tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        rows = int(batch_size) if str(batch_size).isdecimal() else 1
        self._rows = rows if rows > 1 else max_batch_size
        self._tokens_per_pass = tokens_per_pass
        self._add_bos_token = add_bos_token
        self._prefix = self._tokenizer.border if prefix_token_id is None else prefix_token_id
        if not 0 <= self._prefix < model.config.vocab_size:
            raise ArgumentError(
                f"prefix_token_id: {self._prefix}, the tokenizer's border between documents, is outside the model's "
                f"vocabulary of {model.config.vocab_size}; give a token of the model's, or another tokenizer"
            )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._tokenizer.border

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty context becomes."""
        return self._prefix

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say how many."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return f"longscan-{self._tokenizer.identity}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, with the prefix token in front if asked for."""
        tokens: list[int] = self._tokenizer.encode(string.encode()).tolist()
        wanted = self._add_bos_token if add_special_tokens is None else add_special_tokens and self._add_bos_token
        return [self._prefix, *tokens] if wanted and tokens[:1] != [self._prefix] else tokens

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        cut = [self._cut(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring continuations") as bar:
            scores = score_continuations(
                self._model,
                cut,
                tokens_per_pass=self._tokens_per_pass,
                sequences_per_pass=self._rows,
                progress=bar.update,
            )
        answers = [(score.log_likelihood, score.is_greedy) for score in scores]
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The last tokens of a context that is too long; the last token of all is predicted only, and is free."""
        if self.max_length is None:
            return context, continuation
        if len(continuation) > self.max_length:
            raise ArgumentError(
                f"a continuation has {len(continuation)} tokens, max_length is {self.max_length}; "
                "raise it, or set it to None"
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text as a whole, after the prefix token."""
        windows: list[tuple[tuple[str, str] | None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            if self.max_length is None:
                own = [([self._prefix], tokens)] if tokens else []
            else:
                rolling = get_rolling_token_windows(tokens, self._prefix, self.max_length, 1)
                own = [make_disjoint_window(window) for window in rolling]
            windows += [(None, context, continuation) for context, continuation in own]
            owners += [index] * len(own)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, a document's end or the most tokens asked for."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(index)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Generating") as bar:
            for places in groups.values():
                options = _generation_options(requests[places[0]].args[1], self.max_gen_toks)
                prompts = {place: self._prompt(requests[place].args[0], options["max_new_tokens"]) for place in places}
                # Long prompts first, so that a shortage of memory shows at once.
                order = sorted(places, key=lambda place: -len(prompts[place]))
                rows = self._rows or _GENERATED_ROWS
                for first in range(0, len(order), rows):
                    batch = order[first : first + rows]
                    out = self._model.generate(
                        [prompts[place] for place in batch],
                        stop_tokens=[self.eot_token_id],
                        decode=self._tokenizer.decode,
                        prefill_chunk=self._tokens_per_pass,
                        **options,
                    )
                    for place, text in zip(batch, out.texts, strict=True):
                        texts[place] = text
                        self.cache_hook.add_partial("generate_until", requests[place].args, text)
                    bar.update(len(batch))
        return texts

    def _prompt(self, context: str, new_tokens: int) -> list[int]:
        tokens = self.tok_encode(context) or [self._prefix]
        if self.max_length is None:
            return tokens
        if new_tokens >= self.max_length:
            raise ArgumentError(
                f"a task asks for {new_tokens} new tokens, max_length is {self.max_length}; raise it, or set it to None"
            )
        return tokens[-(self.max_length - new_tokens) :]


def _generation_options(given: dict[str, Any], default_tokens: int) -> dict[str, Any]:
    """Options of :meth:`LanguageModel.generate` from a task's.

    Raises:
        ConfigError: an option that our generation does not have.
    """
    values: dict[str, Any] = dict(normalize_gen_kwargs(given, default_tokens))
    sampled = values.pop("do_sample")
    temperature = float(values.pop("temperature", 1.0))
    options: dict[str, Any] = {
        "max_new_tokens": values.pop("max_gen_toks"),
        "stop": tuple(text for text in values.pop("until") or () if text),
        "temperature": temperature if sampled else 0.0,
    }
    for name in ("top_k", "top_p", "min_p", "repetition_penalty", "seed"):
        if values.get(name) is not None:
            options[name] = values[name]
        values.pop(name, None)
    if values.pop("num_beams", 1) != 1 or values:
        raise ConfigError(
            f"generation options {', '.join(values) or 'num_beams'}: not supported; known are until, max_gen_toks, "
            "do_sample, temperature, top_k, top_p, min_p, repetition_penalty and seed"
        )
    return options


def _tokenizer_of(
    pretrained: str | LanguageModel, model: LanguageModel, revision: str | None = None, subfolder: str = ""
) -> str:
    """The tokenizer that a model's folder holds or names."""
    if not isinstance(pretrained, LanguageModel):
        folder = find_folder(pretrained, revision, subfolder)
        if (folder / TOKENIZER_FILE).is_file():
            return str(folder / TOKENIZER_FILE)
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if isinstance(values.get("text"), dict) and "tokenizer" in values["text"]:
            return str(values["text"]["tokenizer"])
        if "ssm_cfg" in values and model.config.vocab_size == _RELEASED_VOCABULARY:
            return _RELEASED_TOKENIZER
    if model.config.vocab_size == 256:
        return BYTES
    name = "this model" if isinstance(pretrained, LanguageModel) else str(Path(pretrained))
    raise ArgumentError(
        f"tokenizer: {name} has none of its own; give {BYTES!r}, a {TOKENIZER_FILE}, a folder with one, "
        "or a name on the Hugging Face Hub"
    )


def main() -> None:
    """The harness's command line, with the model ``longscan``."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
