"""llama.cpp, through `llama-cpp-python`: our weights are written as a GGUF file (`gguf`) that it then runs."""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longscan.mixers import Mamba
from longscan.models import Block, LanguageModel

_QUANTISED = ("token_embd.weight", "ssm_in.weight", "ssm_x.weight", "ssm_out.weight")


class Model:
    """A Mamba of ours in llama.cpp, float32 or bfloat16 weights as ours has, or int8, on the CPU.

    Args:
        model: the weights.
        context: tokens it is made for.
        threads: threads of every call.
        int8: quantise the matrices to its `q8_0`.

    Raises:
        ImportError: llama-cpp-python or gguf is not installed.
    """

    def __init__(self, model: LanguageModel, context: int, threads: int, int8: bool = False) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._vocabulary = model.config.padded_vocab_size
        self._callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, int8)
            options = llama_cpp.llama_model_default_params()
            options.n_gpu_layers = 0
            options.use_mmap = False
            self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError("llama.cpp refuses the GGUF file written for it")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, context, min(context, 512)
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context for this model")

    def reset(self) -> None:
        """Forgets every token so far."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def decode(self, tokens: Tensor) -> Tensor:
        """Scores (1, vocabulary) after `tokens` (length,), which follow those of earlier calls."""
        numbers = (self._api.llama_token * tokens.numel())(*tokens.tolist())
        status = self._api.llama_decode(self._context, self._api.llama_batch_get_one(numbers, tokens.numel()))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, shape=(1, self._vocabulary)).copy())

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._api.llama_free(self._context)
        if getattr(self, "_model", None):
            self._api.llama_model_free(self._model)


def write_gguf(model: LanguageModel, path: Path, int8: bool = False) -> None:
    """Writes the weights under llama.cpp's names, vectors in float32, matrices in our weights' dtype or as `q8_0`.

    As its own quantiser does, those whose rows are no whole groups of 32 and those of the convolution stay as they are.
    """
    import gguf

    config = model.config
    mixer = model.backbone.layers[0].mixer
    assert isinstance(mixer, Mamba)
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.n_layer)
    writer.add_vocab_size(config.padded_vocab_size)
    writer.add_ssm_conv_kernel(mixer.d_conv)
    writer.add_ssm_inner_size(mixer.d_inner)
    writer.add_ssm_state_size(mixer.d_state)
    writer.add_ssm_time_step_rank(mixer.dt_rank)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, tensor: Tensor) -> None:
        values = tensor.detach().float().cpu().contiguous().numpy()
        kinds = gguf.GGMLQuantizationType
        kind = kinds.F32
        if int8 and tensor.dim() == 2 and tensor.shape[1] % 32 == 0 and name.endswith(_QUANTISED):
            kind = kinds.Q8_0
        elif tensor.dtype == torch.bfloat16 and tensor.dim() == 2:
            kind = kinds.BF16
        if kind != kinds.F32:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)

    add("token_embd.weight", model.backbone.embedding.weight)
    add("output_norm.weight", model.backbone.norm_f.weight.float())
    for i, layer in enumerate(model.backbone.layers):
        assert isinstance(layer, Block)
        own = layer.mixer
        assert isinstance(own, Mamba)
        assert own.conv1d.bias is not None
        assert layer.norm is not None
        add(f"blk.{i}.attn_norm.weight", layer.norm.weight.float())
        add(f"blk.{i}.ssm_in.weight", own.in_proj.weight)
        add(f"blk.{i}.ssm_conv1d.weight", own.conv1d.weight.squeeze(1).float())
        add(f"blk.{i}.ssm_conv1d.bias", own.conv1d.bias.float())
        add(f"blk.{i}.ssm_x.weight", own.x_proj.weight)
        add(f"blk.{i}.ssm_dt.weight", own.dt_proj.weight)
        add(f"blk.{i}.ssm_dt.bias", own.dt_proj.bias.float())
        add(f"blk.{i}.ssm_a", own.A.float())
        add(f"blk.{i}.ssm_d", own.D.float())
        add(f"blk.{i}.ssm_out.weight", own.out_proj.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
