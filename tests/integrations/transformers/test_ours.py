"""Our models as Transformers': one folder for both loaders, the same numbers, generation, pipelines."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longscan.errors import ArgumentError, CheckpointError, ConfigError
from longscan.models import LanguageModel
from longscan.nn.storage import load_tensors, save_tensors
from tests.models.small import KINDS, VOCABULARY, make

transformers = pytest.importorskip("transformers")

hf = pytest.importorskip("longscan.integrations.transformers")

TOKENS = torch.tensor([[1, 2, 3, 4, 12, 5, 7], [9, 8, 7, 6, 5, 4, 3]])
EXACT = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _registered() -> None:
    hf.register()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load(model: LanguageModel, folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model.save_pretrained(folder), **options)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for what the place of a weight in memory does to a matrix product."""
    torch.testing.assert_close(ours, theirs)


def plain(**options: Any) -> dict[str, Any]:
    return {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}


@pytest.mark.parametrize("kind", KINDS)
def test_one_folder_for_both(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    theirs = load(model, tmp_path / "ours")
    assert isinstance(theirs, hf.LongscanForCausalLM)
    assert theirs.config.to_longscan() == model.config
    assert_same(theirs(TOKENS).logits, model(TOKENS)[0])
    # In one file and in shards, and back.
    for name, size in (("whole", "1GB"), ("shards", "8KB")):
        theirs.save_pretrained(tmp_path / name, max_shard_size=size)
        again = LanguageModel.from_pretrained(tmp_path / name)
        assert again.config == model.config
        assert again.state_dict().keys() == model.state_dict().keys()
        assert_same(again(TOKENS)[0], model(TOKENS)[0])
        third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert_same(third(TOKENS).logits, model(TOKENS)[0])
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert config.hidden_size == model.config.d_model
    assert config.tie_word_embeddings == model.config.tie_embeddings


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_marks(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """What must stay float32 does, whoever loads; what is not to decay is marked."""
    model = make(kind)
    theirs = load(model, tmp_path, dtype=dtype)
    ours = LanguageModel.from_pretrained(tmp_path, dtype=dtype)

    def about(model: Any) -> dict[str, Any]:
        return {
            name: (p.dtype, sorted(vars(p).keys() - {"_is_hf_initialized"})) for name, p in model.named_parameters()
        }

    assert about(theirs) == about(ours)
    assert_same(theirs(TOKENS).logits, ours(TOKENS)[0])
    assert about(theirs.to(torch.float32).to(dtype)) == about(ours)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind: str) -> None:
    model = make(kind)
    theirs = hf.LongscanForCausalLM.from_longscan(model)
    loss = model.loss(TOKENS[:, :-1], TOKENS[:, 1:])
    expected = torch.autograd.grad(loss, list(model.parameters()))
    output = theirs(TOKENS, labels=TOKENS)
    torch.testing.assert_close(output.loss, loss)
    found = torch.autograd.grad(output.loss, list(theirs.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_ours(kind: str) -> None:
    model = make(kind).eval()
    theirs = hf.LongscanForCausalLM.from_longscan(model)
    found = theirs.generate(TOKENS, **plain(max_new_tokens=6))
    assert found[:, 7:].tolist() == model.generate(TOKENS, 6, temperature=0).tokens
    # A search that reorders states finds what one that reads everything anew finds.
    beams = plain(max_new_tokens=5, num_beams=3, num_return_sequences=2)
    assert torch.equal(theirs.generate(TOKENS, **beams), theirs.generate(TOKENS, use_cache=False, **beams))
    for cache in (True, False):
        torch.manual_seed(0)
        sampled = theirs.generate(TOKENS, **plain(max_new_tokens=5, do_sample=True, top_k=4, use_cache=cache))
        found = sampled if cache else found
        assert cache or torch.equal(sampled[:, :7], TOKENS)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        theirs.generate(TOKENS[:1], assistant_model=theirs, **plain(max_new_tokens=2))


def test_a_streamer_hears_every_token_as_it_comes() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def put(self, tokens: torch.Tensor) -> None:
            self.heard += tokens.flatten().tolist()

        def end(self) -> None:
            self.heard.append("end")

    streamer = Streamer()
    theirs = hf.LongscanForCausalLM.from_longscan(make().eval())
    found = theirs.generate(TOKENS[:1], streamer=streamer, **plain(max_new_tokens=4))
    assert streamer.heard == [*found[0].tolist(), "end"]


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_sampling_with_and_without_a_state(use_cache: bool) -> None:
    theirs = hf.LongscanForCausalLM.from_longscan(make().eval())
    torch.manual_seed(0)
    expected = theirs.generate(TOKENS, **plain(max_new_tokens=6, do_sample=True, use_cache=True))
    torch.manual_seed(0)
    again = theirs.generate(TOKENS, **plain(max_new_tokens=6, do_sample=True, use_cache=use_cache))
    assert torch.equal(again, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_go_on_as_they_would_alone(kind: str, side: str) -> None:
    model = make(kind).eval()
    theirs = hf.LongscanForCausalLM.from_longscan(model)
    prompts = [[1, 2, 3, 4, 5], [6, 7], [8]]
    rows, masks = [], []
    for prompt in prompts:
        padding = [0] * (5 - len(prompt))
        rows.append(padding + prompt if side == "left" else prompt + padding)
        ones = [1] * len(prompt)
        masks.append(padding + ones if side == "left" else ones + padding)
    batch, mask = torch.tensor(rows), torch.tensor(masks)
    expected = model.generate(prompts, 6, temperature=0).tokens
    assert theirs.generate(batch, attention_mask=mask, **plain(max_new_tokens=6))[:, 5:].tolist() == expected
    beams = plain(max_new_tokens=4, num_beams=3)
    found = theirs.generate(batch, attention_mask=mask, **beams)[:, 5:]
    for row, prompt in enumerate(prompts):
        alone = theirs.generate(torch.tensor([prompt]), **beams)[0, len(prompt) :]
        assert torch.equal(found[row], alone)


@settings(max_examples=20, deadline=None)
@given(st.data())
@torch.no_grad()
def test_whole_is_cut_anywhere_with_any_padding(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(KINDS)))
    theirs = hf.LongscanForCausalLM.from_longscan(make(kind).eval())
    cuts = data.draw(st.lists(st.integers(1, 6), max_size=3).map(lambda places: sorted({0, 7, *places})))
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=2, max_size=2)))
    mask[0] = True
    expected = theirs(TOKENS[:1]).logits[0]
    own = TOKENS[1][mask[1]]
    second = theirs(own[None]).logits[0] if len(own) else None
    cache, seen = None, 0
    for start, stop in itertools.pairwise(cuts):
        output = theirs(TOKENS[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        torch.testing.assert_close(output.logits[0], expected[start:stop], **EXACT)
        here = mask[1, start:stop]
        if second is not None and here.any():
            count = int(here.sum())
            torch.testing.assert_close(output.logits[1][here], second[seen : seen + count], **EXACT)
            torch.testing.assert_close(output.logits[1, -1], second[seen + count - 1], **EXACT)
            seen += count
    assert cache.get_seq_length() == 7


@torch.no_grad()
def test_a_chunk_that_is_all_padding_changes_nothing() -> None:
    theirs = hf.LongscanForCausalLM.from_longscan(make("mixed").eval())
    whole, nothing = theirs(TOKENS).logits, torch.zeros(2, 3, dtype=torch.int64)
    cache = theirs(TOKENS[:, :3], attention_mask=nothing).past_key_values
    cache = theirs(TOKENS[:, :4], past_key_values=cache).past_key_values
    output = theirs(TOKENS[:, :3], attention_mask=nothing, past_key_values=cache, output_hidden_states=True)
    assert [stream.shape for stream in output.hidden_states] == [(2, 3, theirs.config.d_model)] * 4
    torch.testing.assert_close(theirs(TOKENS[:, 4:], past_key_values=cache).logits, whole[:, 4:], **EXACT)


@torch.no_grad()
def test_what_a_call_can_ask_for() -> None:
    model = make("mixed").eval()
    theirs = hf.LongscanForCausalLM.from_longscan(model)
    output = theirs(TOKENS, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    torch.testing.assert_close(output.hidden_states[0], model.backbone.embedding(TOKENS))
    final, _ = model.backbone.norm_f(output.hidden_states[-1])
    torch.testing.assert_close(model.head(final), output.logits)
    torch.testing.assert_close(theirs(TOKENS, logits_to_keep=2).logits, output.logits[:, -2:])
    torch.testing.assert_close(theirs(inputs_embeds=model.backbone.embedding(TOKENS)).logits, output.logits)
    logits, cache = theirs(TOKENS, return_dict=False)
    torch.testing.assert_close(logits, output.logits)
    assert isinstance(cache, hf.LongscanCache)
    assert theirs(TOKENS, use_cache=False).past_key_values is None
    assert theirs.train()(TOKENS).past_key_values is None
    with pytest.raises(ArgumentError, match="give one of them"):
        theirs()
    with pytest.raises(ArgumentError, match="expected a LongscanCache"):
        theirs(TOKENS, past_key_values=transformers.DynamicCache())
    with pytest.raises(ArgumentError, match="cannot give tokens back"):
        cache.crop(-1)


@torch.no_grad()
def test_a_generation_goes_on_from_its_cache() -> None:
    theirs = hf.LongscanForCausalLM.from_longscan(make().eval())
    whole = theirs.generate(TOKENS, **plain(max_new_tokens=8))
    first = theirs.generate(TOKENS, **plain(max_new_tokens=3, return_dict_in_generate=True))
    more = theirs.generate(first.sequences, past_key_values=first.past_key_values, **plain(max_new_tokens=5))
    assert torch.equal(more, whole)
    # A long prompt can go in pieces.
    cache = hf.LongscanCache()
    pieces = theirs.generate(TOKENS, past_key_values=cache, prefill_chunk_size=3, **plain(max_new_tokens=8))
    assert torch.equal(pieces, whole)


@torch.no_grad()
def test_changed_weights_are_seen_while_decoding() -> None:
    model = make().eval()
    theirs = hf.LongscanForCausalLM.from_longscan(model)
    for change in (0.0, 0.5):
        model.backbone.blocks[0].mixer.A_log.data.add_(change)
        cache = theirs(TOKENS[:, :4]).past_key_values
        steps = [theirs(TOKENS[:, t : t + 1], past_key_values=cache).logits for t in range(4, 7)]
        torch.testing.assert_close(torch.cat(steps, 1), model(TOKENS)[0][:, 4:], **EXACT)


def test_more_tokens(tmp_path: Path) -> None:
    """After a resize all rows are tokens, for both loaders."""
    theirs = hf.LongscanForCausalLM.from_longscan(make().eval())
    theirs.resize_token_embeddings(VOCABULARY + 7)
    ids = torch.tensor([[VOCABULARY + 6, 1, 2]])
    logits = theirs(ids).logits
    assert logits.shape[-1] == VOCABULARY + 7
    theirs.save_pretrained(tmp_path)
    assert torch.equal(LanguageModel.from_pretrained(tmp_path)(ids)[0], logits)
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)


def test_to_and_from(tmp_path: Path) -> None:
    model = make("mixed").eval()
    theirs = hf.LongscanForCausalLM.from_longscan(model, eos_token_id=3)
    back = theirs.to_longscan()
    assert back.backbone is model.backbone
    assert not back.training
    assert torch.equal(back(TOKENS)[0], model(TOKENS)[0])
    theirs.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).eos_token_id == 3
    fresh = transformers.AutoModelForCausalLM.from_config(theirs.config)
    mixer = fresh.backbone.blocks[2].mixer
    assert torch.equal(mixer.A_log.exp().round()[0], torch.arange(1.0, mixer.d_state + 1))


def test_faults_are_named(tmp_path: Path) -> None:
    folder = make().save_pretrained(tmp_path)
    tensors, _ = load_tensors(folder / "model.safetensors")
    del tensors["backbone.layers.0.mixer.D"]
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: backbone\.layers\.0\.mixer\.D"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match="mixer 'mambo' is not registered"):
        hf.LongscanConfig(mixer="mambo")


def test_a_pipeline(tmp_path: Path) -> None:
    """Text in, text out, in a batch of different lengths; the tokenizer pads on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, **{letter: number for number, letter in enumerate("abcdefghijkl", start=1)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", padding_side="left")
    model = make().eval()
    tokenizer.save_pretrained(model.save_pretrained(tmp_path))
    write = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    prompts = ["a b c d e", "f g"]
    found = write(prompts, max_new_tokens=4, do_sample=False, batch_size=2, return_full_text=False)
    expected = model.generate([[1, 2, 3, 4, 5], [6, 7]], 4, temperature=0).tokens
    assert [out[0]["generated_text"] for out in found] == [tokenizer.decode(tokens) for tokens in expected]


def test_int8_weights_are_refused_in_words(tmp_path: Path) -> None:
    model = make().quantize()
    with pytest.raises(CheckpointError, match=r"has int8 weights.*LanguageModel\.from_pretrained"):
        load(model, tmp_path)
    with pytest.raises(ArgumentError, match="model: has int8 weights"):
        hf.LongscanForCausalLM.from_longscan(model)
