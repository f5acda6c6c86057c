"""One token through a whole Mamba, in one compiled call, at the speed of reading its weights.

Decoding one token reads every weight once and does two flops with it, so memory sets the floor; calls into small
operators, and linear layers that are made for matrices, cost several times that. Here a model's Mamba layers, its final
norm and its head are one call:

    layers = [MambaStepWeights(norm=..., in_proj=..., conv=..., ...) for block in blocks]
    decoder = MambaDecoder(layers, embedding=embedding, final_norm=norm_f)      # head=None: tied to the embedding
    logits = decoder.step(tokens, states)            # (batch,) -> (batch, vocabulary) float32
    hidden, residual = decoder.step_hidden(hidden, residual, states)            # the layers alone
    hidden, residual = mamba_block_step(hidden, residual, weights, conv_state, ssm_state)   # one layer

`states` holds one `(conv_state, ssm_state)` per layer, (batch, width - 1, d_inner) in float32, bfloat16 or float16 and
(batch, d_inner, d_state) in float32, both contiguous; **they are updated in place**. Weight matrices are float32,
bfloat16, float16 or (on the CPU) `longscan.ops.int8.Int8Matrix`, used where they lie (the objects keep them alive);
vectors and A are copied to float32 when the objects are made, so build new ones after the weights have changed: it
takes under a millisecond a layer. Arithmetic and the residual stream are float32. What it cannot serve (another device,
complex A, no Numba) it refuses with `BackendError` when it is built, so that a caller can take the general path
instead; wrong shapes are `ArgumentError`.

On an NVIDIA GPU :class:`CudaMambaDecoder` takes the same weights; its step is made to be captured as a CUDA graph.

On the CPU the same inputs give the same bits, for any number of threads (`torch.get_num_threads()`), and a row of a
batch the same bits as alone.
"""

from __future__ import annotations

from longscan.ops.mamba_step.cuda import CudaMambaDecoder
from longscan.ops.mamba_step.decoder import MambaDecoder, mamba_block_step
from longscan.ops.mamba_step.mlp_weights import MlpStepWeights
from longscan.ops.mamba_step.vectors import VectorProducts
from longscan.ops.mamba_step.weights import MambaStepWeights

__all__ = [
    "CudaMambaDecoder",
    "MambaDecoder",
    "MambaStepWeights",
    "MlpStepWeights",
    "VectorProducts",
    "mamba_block_step",
]
