"""Small models with random weights and their inputs, the same every time."""

from typing import Any

import torch
from transformers import AutoModel

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT: dict[str, Any] = {**SMALL, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 4}
WHISPER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 60,
    "max_source_positions": 50,
    "max_target_positions": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
}


def build(config: Any, kind: Any = AutoModel, sharp: float = 8.0) -> Any:
    """A model with random weights, the same every time; `sharp` makes its attention less even, so that errors show."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(config) if kind is AutoModel else kind(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if any(part in name.lower() for part in ("query", "key", "q_proj", "k_proj", "q_lin", "k_lin", "wqkv")):
                    weight *= sharp
    return model.eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(seed))


def text_inputs(length: int = 40, examples: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = tokens(examples, length, seed=seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_inputs() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def speech_inputs(text: int = 50) -> dict[str, torch.Tensor]:
    features = torch.randn(2, 80, 100, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": tokens(2, text)}
