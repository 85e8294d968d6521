"""Transformers model types, each with a tiny configuration and a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lsquant.convert import Changes

VOCABULARY = 64
Batch = dict[str, Any]


def tokens(length: int = 11, **more: Any) -> Batch:
    """Two sequences of token numbers, none of them special."""
    return {"input_ids": torch.randint(5, VOCABULARY - 4, (2, length)), **more}


def with_labels(length: int = 11) -> Batch:
    batch = tokens(length)
    return {**batch, "labels": batch["input_ids"].clone()}


def with_global_attention(batch: Batch) -> Batch:
    """The first place looks at all the others."""
    mask = torch.zeros_like(batch["input_ids"])
    mask[:, 0] = 1
    return {**batch, "global_attention_mask": mask}


def both_sides() -> Batch:
    """For encoder-decoders: the decoder's input is made from the labels."""
    return {**tokens(), "labels": tokens(7)["input_ids"]}


def image(size: int = 32, channels: int = 3) -> Batch:
    return {"pixel_values": torch.randn(2, channels, size, size)}


def sound(length: int = 1600) -> Batch:
    return {"input_values": torch.randn(2, length)}


def spectrum(frames: int = 40, bins: int = 16) -> Batch:
    return {"input_features": torch.randn(2, bins, frames), "labels": tokens(7)["input_ids"]}


def image_and_text() -> Batch:
    return {**image(), **tokens(9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}


@dataclass(frozen=True)
class Entry:
    """One model type: its class, what its configuration is given, and a maker of batches."""

    cls: str
    config: Mapping[str, Any]
    batch: Callable[[], Batch]
    kind: str
    skip: tuple[str, ...] = ()  # layers that the model's usual forward pass does not use


@dataclass(frozen=True)
class Result:
    """What a model type's run gave."""

    changes: Changes
    layers: int


ENCODER = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
           "intermediate_size": 48, "max_position_embeddings": 40}  # fmt: skip
DECODER = {**ENCODER, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1,
           "eos_token_id": 2}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "use_cache": False,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
BART = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "use_cache": False,
        "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "forced_eos_token_id": 2}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
      "use_cache": False, "decoder_start_token_id": 0}  # fmt: skip
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
       "patch_size": 8}  # fmt: skip
WAV2VEC2 = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48, "conv_dim": (16, 16, 16), "conv_stride": (5, 4, 2), "conv_kernel": (10, 4, 3),
            "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
            "layerdrop": 0.0, "apply_spec_augment": False}  # fmt: skip
MOE = {**DECODER, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
TEXT_TOWER = {**ENCODER, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOWERS = {"text_config": TEXT_TOWER, "vision_config": VIT, "projection_dim": 24}


def _text(cls: str, *more: Mapping[str, Any], batch: Callable[[], Batch] = with_labels, kind: str = "decoder") -> Entry:
    merged: dict[str, Any] = {}
    for one in more:
        merged.update(one)
    return Entry(cls, merged, batch, kind)


def _encoder(cls: str, *more: Mapping[str, Any], batch: Callable[[], Batch] = with_labels) -> Entry:
    return _text(cls, ENCODER, *more, batch=batch, kind="encoder")


def _decoder(cls: str, *more: Mapping[str, Any]) -> Entry:
    return _text(cls, DECODER, *more)


def _seq2seq(cls: str, *more: Mapping[str, Any], batch: Callable[[], Batch] = both_sides) -> Entry:
    return _text(cls, *more, batch=batch, kind="encoder-decoder")


def _vision(cls: str, *more: Mapping[str, Any], batch: Callable[[], Batch] = image) -> Entry:
    return _text(cls, *more, batch=batch, kind="vision")


def _audio(cls: str, *more: Mapping[str, Any], batch: Callable[[], Batch] = sound) -> Entry:
    return _text(cls, *more, batch=batch, kind="audio")


def _both(cls: str, *more: Mapping[str, Any], batch: Callable[[], Batch] = image_and_text) -> Entry:
    return _text(cls, *more, batch=batch, kind="image and text")


TYPES: dict[str, Entry] = {
    # encoders
    "bert": _encoder("BertForMaskedLM"),
    "roberta": _encoder("RobertaForMaskedLM"),
    "xlm-roberta": _encoder("XLMRobertaForMaskedLM"),
    "camembert": _encoder("CamembertForMaskedLM"),
    "distilbert": _encoder("DistilBertForMaskedLM", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "albert": _encoder("AlbertForMaskedLM", {"embedding_size": 16}),
    "electra": _encoder("ElectraForMaskedLM", {"embedding_size": 16}),
    "deberta": _encoder("DebertaForMaskedLM", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "deberta-v2": _encoder("DebertaV2ForMaskedLM", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "mpnet": _encoder("MPNetForMaskedLM"),
    "layoutlm": _encoder("LayoutLMForMaskedLM"),
    "xlnet": _text("XLNetLMHeadModel", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4,
                                        "d_inner": 48}, kind="encoder"),
    "mobilebert": _encoder("MobileBertForMaskedLM", {"embedding_size": 16, "intra_bottleneck_size": 16,
                                                     "true_hidden_size": 16, "num_feedforward_networks": 2}),
    "squeezebert": _encoder("SqueezeBertForMaskedLM", {"embedding_size": 32}),
    "convbert": _encoder("ConvBertForMaskedLM", {"embedding_size": 32, "conv_kernel_size": 3}),
    "fnet": _encoder("FNetForMaskedLM"),
    "nystromformer": _encoder("NystromformerForMaskedLM", {"segment_means_seq_len": 11, "num_landmarks": 11}),
    "rembert": _encoder("RemBertForMaskedLM", {"input_embedding_size": 16, "output_embedding_size": 24}),
    "roformer": _encoder("RoFormerForMaskedLM"),
    "modernbert": _encoder("ModernBertForMaskedLM", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                                                     "cls_token_id": 1, "sep_token_id": 2}),
    "esm": replace(_encoder("EsmForMaskedLM", {"pad_token_id": 1, "mask_token_id": 3}), skip=("*contact_head*",)),
    "funnel": _text("FunnelForMaskedLM", {"vocab_size": VOCABULARY, "d_model": 32, "n_head": 4, "d_head": 8,
                                          "d_inner": 48, "block_sizes": [1, 1], "num_decoder_layers": 1},
                    batch=lambda: with_labels(12), kind="encoder"),
    "longformer": _encoder("LongformerForMaskedLM", {"attention_window": [4, 4]},
                           batch=lambda: with_global_attention(with_labels(12))),
    "big_bird": _encoder("BigBirdForMaskedLM", {"attention_type": "original_full"}),
    "ibert": _encoder("IBertForMaskedLM"),
    # decoders
    "gpt2": _text("GPT2LMHeadModel", GPT2),
    "gpt_bigcode": _text("GPTBigCodeForCausalLM", GPT2),
    "openai-gpt": _text("OpenAIGPTLMHeadModel", GPT2),
    "codegen": _text("CodeGenForCausalLM", GPT2, {"rotary_dim": 4, "n_ctx": 40}),
    "gptj": _text("GPTJForCausalLM", GPT2, {"rotary_dim": 4}),
    "gpt_neo": _decoder("GPTNeoForCausalLM", {"num_layers": 2, "num_heads": 4,
                                              "attention_types": [[["global", "local"], 1]]}),
    "gpt_neox": _decoder("GPTNeoXForCausalLM"),
    "opt": _decoder("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": _text("BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4,
                                        "use_cache": False}),
    "ctrl": _text("CTRLLMHeadModel", GPT2, {"dff": 48}),
    "xglm": _text("XGLMForCausalLM", {"vocab_size": VOCABULARY, "d_model": 32, "ffn_dim": 48, "num_layers": 2,
                                      "attention_heads": 4, "use_cache": False, "max_position_embeddings": 40}),
    "biogpt": _decoder("BioGptForCausalLM"),
    "llama": _decoder("LlamaForCausalLM"),
    "mistral": _decoder("MistralForCausalLM"),
    "qwen2": _decoder("Qwen2ForCausalLM"),
    "qwen3": _decoder("Qwen3ForCausalLM", {"head_dim": 8}),
    "phi": _decoder("PhiForCausalLM"),
    "phi3": _decoder("Phi3ForCausalLM"),
    "gemma": _decoder("GemmaForCausalLM", {"head_dim": 8}),
    "gemma2": _decoder("Gemma2ForCausalLM", {"head_dim": 8}),
    "gemma3_text": _decoder("Gemma3ForCausalLM", {"head_dim": 8}),
    "falcon": _decoder("FalconForCausalLM"),
    "stablelm": _decoder("StableLmForCausalLM"),
    "olmo": _decoder("OlmoForCausalLM"),
    "olmo2": _decoder("Olmo2ForCausalLM"),
    "granite": _decoder("GraniteForCausalLM"),
    "cohere": _decoder("CohereForCausalLM"),
    "starcoder2": _decoder("Starcoder2ForCausalLM"),
    "smollm3": _decoder("SmolLM3ForCausalLM"),
    "nemotron": _decoder("NemotronForCausalLM"),
    "glm": _decoder("GlmForCausalLM", {"head_dim": 8}),
    "mpt": _text("MptForCausalLM", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4,
                                    "max_seq_len": 40, "expansion_ratio": 2, "use_cache": False}),
    "persimmon": _decoder("PersimmonForCausalLM"),
    "mamba": _text("MambaForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
                                        "state_size": 4, "use_cache": False, "pad_token_id": 0}),
    "mamba2": _text("Mamba2ForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
                                          "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2,
                                          "chunk_size": 8, "use_cache": False, "pad_token_id": 0}),
    "rwkv": _text("RwkvForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
                                      "intermediate_size": 48, "context_length": 40, "use_cache": False}),
    "recurrent_gemma": _decoder("RecurrentGemmaForCausalLM", {"num_hidden_layers": 3, "lru_width": 32,
                                                              "attention_window_size": 16}),
    "mixtral": _decoder("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": _text("Qwen2MoeForCausalLM", MOE, {"num_experts": 4, "shared_expert_intermediate_size": 24}),
    "olmoe": _text("OlmoeForCausalLM", MOE, {"num_experts": 4}),
    # encoder-decoders
    "t5": _seq2seq("T5ForConditionalGeneration", T5),
    "mt5": _seq2seq("MT5ForConditionalGeneration", T5),
    "switch_transformers": _seq2seq("SwitchTransformersForConditionalGeneration", T5, {"num_experts": 2,
                                    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
                                    batch=lambda: {**tokens(24), "labels": tokens(24)["input_ids"]}),
    "bart": _seq2seq("BartForConditionalGeneration", BART),
    "mbart": _seq2seq("MBartForConditionalGeneration", BART),
    "marian": _seq2seq("MarianMTModel", BART),
    "pegasus": _seq2seq("PegasusForConditionalGeneration", BART),
    "blenderbot": _seq2seq("BlenderbotForConditionalGeneration", BART),
    "m2m_100": _seq2seq("M2M100ForConditionalGeneration", BART),
    "prophetnet": _seq2seq("ProphetNetForConditionalGeneration", {
        "vocab_size": VOCABULARY, "hidden_size": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4, "use_cache": False, "max_position_embeddings": 40}),
    "led": _seq2seq("LEDForConditionalGeneration", BART, {"attention_window": [4],
                    "max_encoder_position_embeddings": 40, "max_decoder_position_embeddings": 40},
                    batch=lambda: with_global_attention({**both_sides(), **tokens(12)})),
    # vision
    "vit": _vision("ViTForImageClassification", VIT),
    "deit": _vision("DeiTForImageClassification", VIT),
    "beit": _vision("BeitForImageClassification", VIT),
    "dinov2": _vision("Dinov2ForImageClassification", VIT, {"mlp_ratio": 2}),
    "vit_mae": _vision("ViTMAEForPreTraining", VIT, {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
                                                     "decoder_num_attention_heads": 2, "decoder_intermediate_size": 24,
                                                     "mask_ratio": 0.5}),
    "yolos": _vision("YolosModel", VIT, {"image_size": [32, 32], "num_detection_tokens": 4}),
    "swin": _vision("SwinForImageClassification", {"image_size": 32, "patch_size": 4, "embed_dim": 16,
                                                   "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
    "swinv2": _vision("Swinv2ForImageClassification", {"image_size": 32, "patch_size": 4, "embed_dim": 16,
                                                       "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
    "convnext": _vision("ConvNextForImageClassification", {"hidden_sizes": [8, 12], "depths": [1, 1],
                                                           "num_stages": 2}),
    "convnextv2": _vision("ConvNextV2ForImageClassification", {"hidden_sizes": [8, 12], "depths": [1, 1],
                                                               "num_stages": 2}),
    "resnet": _vision("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                                       "layer_type": "basic"}),
    "regnet": _vision("RegNetForImageClassification", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
                                                       "groups_width": 4}),
    "bit": _vision("BitForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                                 "num_groups": 4}),
    "mobilenet_v1": _vision("MobileNetV1ForImageClassification", {"depth_multiplier": 0.25}),
    "mobilenet_v2": _vision("MobileNetV2ForImageClassification", {"depth_multiplier": 0.25}),
    "efficientnet": _vision("EfficientNetForImageClassification", {
        "image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320,
        "initializer_range": 0.5}),
    "mobilevit": _vision("MobileViTForImageClassification", {
        "image_size": 64, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
        "num_attention_heads": 2, "initializer_range": 0.1}, batch=lambda: image(64)),
    "segformer": _vision("SegformerForImageClassification", {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
        "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}),
    "poolformer": _vision("PoolFormerForImageClassification", {
        "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3], "strides": [4, 2],
        "padding": [2, 1], "mlp_ratio": 2.0}),
    "pvt_v2": _vision("PvtV2ForImageClassification", {
        "image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
        "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}),
    "levit": _vision("LevitForImageClassification", {
        "image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
        "key_dim": [8, 8, 8]}, batch=lambda: image(64)),
    "focalnet": _vision("FocalNetForImageClassification", {
        "image_size": 32, "embed_dim": 16, "hidden_sizes": [16, 24], "depths": [1, 1], "focal_levels": [1, 1],
        "focal_windows": [3, 3]}),
    # audio
    "wav2vec2": _audio("Wav2Vec2Model", WAV2VEC2),
    "hubert": _audio("HubertModel", WAV2VEC2),
    "wavlm": _audio("WavLMModel", WAV2VEC2),
    "data2vec-audio": _audio("Data2VecAudioModel", WAV2VEC2),
    "sew": _audio("SEWModel", WAV2VEC2, {"squeeze_factor": 2}),
    "whisper": _audio("WhisperForConditionalGeneration", BART, {"num_mel_bins": 16, "max_source_positions": 20,
                      "max_target_positions": 20}, batch=spectrum),
    "speech_to_text": _audio("Speech2TextForConditionalGeneration", BART, {
        "input_feat_per_channel": 16, "input_channels": 1, "conv_channels": 24, "max_source_positions": 40,
        "max_target_positions": 20},
        batch=lambda: {"input_features": torch.randn(2, 40, 16), "labels": tokens(7)["input_ids"]}),
    "audio-spectrogram-transformer": _audio("ASTForAudioClassification", VIT, {
        "max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
        batch=lambda: {"input_values": torch.randn(2, 32, 16)}),
    # image and text
    "clip": _both("CLIPModel", TOWERS),
    "siglip": _both("SiglipModel", {"text_config": TEXT_TOWER, "vision_config": VIT}),
    "altclip": _both("AltCLIPModel", TOWERS, {"text_config": {**TEXT_TOWER, "project_dim": 32}}),
    "chinese_clip": _both("ChineseCLIPModel", TOWERS),
    "blip": _both("BlipForConditionalGeneration", TOWERS,
                  batch=lambda: {**image_and_text(), "labels": tokens(9)["input_ids"]}),
    "vilt": _both("ViltModel", ENCODER, VIT, {"num_images": -1}),
    "llava": _both("LlavaForConditionalGeneration", {
        "text_config": {**DECODER, "model_type": "llama"}, "vision_config": {**VIT, "model_type": "clip_vision_model"},
        "image_token_index": 63, "image_seq_length": 16},
        batch=lambda: {**image(), **_with_image_tokens(63, 16)}),
}  # fmt: skip

FAST = ("bert", "albert", "gpt2", "llama", "falcon", "mixtral", "t5", "bart", "vit", "resnet", "wav2vec2", "clip")
"""Those that `make test` runs; the others are slow tests."""

KNOWN: dict[str, str] = {}
"""Types that cannot be quantized this way -> why, as the error says."""


def _with_image_tokens(token: int, count: int) -> Batch:
    ids = torch.cat([torch.full((2, count), token), tokens(5)["input_ids"]], 1)
    return {"input_ids": ids, "labels": ids.clone()}
