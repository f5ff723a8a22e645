"""What the defaults of some configs leave open or contradict, and published models state.

Invariant: without its entry here, a model of the type cannot be built, or runs nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HALF_ROTARY = {"rope_parameters": {"partial_rotary_factor": 0.5}}
_FULL_ROPE = {
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
}
_FOUR_AXES = {"head_dim": 128, "rope_parameters": {"mrope_section": [16, 16, 16, 16]}}
_EXPERTS = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}
_WIDENING = ((96, 96), (96, 192), (192, 384))
_REPVIT = {"backbone_config": {"architecture": "repvit_m1"}}

STATED: Mapping[str, Mapping[str, Any]] = {
    "aya_vision": {"vision_config": {"num_attention_heads": 16}},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"num_hidden_layers": 2},
    "chameleon": {"vocabulary_map": {"<image>": 4}, "image_token_id": 4},
    "cohere_compass": {"text_config": _FULL_ROPE},
    "cohere_compass_text": _FULL_ROPE,
    "deepseek_v2": {"num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    "diffusion_gemma": {"text_config": _EXPERTS},
    "edgetam": {"vision_config": _REPVIT},
    "edgetam_vision_model": _REPVIT,
    "glm46v": {"text_config": _HALF_ROTARY},
    "glm4v": {"text_config": _HALF_ROTARY},
    "glm4v_moe": {"text_config": {"head_dim": 128, **_HALF_ROTARY}},
    "glm4v_moe_text": {"head_dim": 128, **_HALF_ROTARY},
    "glm4v_text": _HALF_ROTARY,
    "glm_image": {"text_config": _HALF_ROTARY},
    "glm_image_text": _HALF_ROTARY,
    "glmga": {"text_config": _HALF_ROTARY},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "hunyuan_vl": {"text_config": _FOUR_AXES},
    "hunyuan_vl_text": _FOUR_AXES,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "lw_detr": {
        "projector_scale_factors": [1.0],
        "projector_in_channels": [256],
        "num_feature_levels": 1,
    },
    "moonshine_streaming": {"num_key_value_heads": 8},
    "pp_doclayout_v2": {"class_thresholds": [0.5, 0.5], "class_order": [0, 1]},
    "pp_ocrv6_small_det": {
        "backbone_config": {
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
            "out_indices": [1, 2, 3, 4],
            "block_configs": [
                [[3, 96, 96, 1, True]],
                *([[3, *sizes, 2, False]] for sizes in _WIDENING),
            ],
            "depths": [1, 1, 1, 1],
        },
        "layer_list_out_channels": [96, 96, 192, 384],
    },
    "qwen3_omni_moe_thinker": {"text_config": {"num_attention_heads": 32, "head_dim": 128}},
    "reformer": {"axial_pos_shape": [8, 16], "max_position_embeddings": 128},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "timm_backbone": {"backbone": "resnet18"},
    "uvdoc": {
        "backbone_config": {
            "out_features": [f"stage{stage}" for stage in range(1, 7)],
            "out_indices": [1, 2, 3, 4, 5, 6],
        }
    },
    "vitmatte": {
        "backbone_config": {"hidden_size": 384, "num_attention_heads": 6, "num_channels": 4}
    },
    # its hybrid layers share weights, which takes two of them
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 38},
    "xmod": {"default_language": "en_XX"},
}
