"""The config.json of a Hugging Face folder, both ways: MiniCPM as released, and plain Llama.

Keys that the released files leave out take the defaults of OpenBMB's configuration_minicpm.py, and what was filled in
is said; a key that would change what the model computes in a way that we do not compute is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cpmjax.formats.fold import Constants, as_llama, constants
from cpmjax.formats.json_files import read_json, write_json
from cpmjax.model.weights import BFLOAT16, FLOAT16, FLOAT32
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError

_COUNTS = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "feed_forward": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
}
_OPTIONAL_COUNTS = {"kv_heads": "num_key_value_heads", "head_width": "head_dim"}
_MUP = ("scale_emb", "scale_depth", "dim_model_base")
# Ours: (theirs, what transformers takes where it is missing).
_DEFAULTS: dict[str, tuple[str, int | float]] = {
    "context": ("max_position_embeddings", 2048),
    "norm_epsilon": ("rms_norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 10000.0),
    "init_std": ("initializer_range", 0.1),
}
_TIED = {"minicpm": True, "llama": False}  # by default, by model_type
# Keys that would change what is computed: the values with which it is what we compute.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "num_experts": (0, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
_TORCH_TYPES = {BFLOAT16: "bfloat16", FLOAT16: "float16", FLOAT32: "float32"}
# Where transformers finds the code of a MiniCPM, which is no part of it.
_CODE = "openbmb/MiniCPM-2B-sft-bf16"


def read_config(path: Path, known: Constants | None = None) -> tuple[ModelConfig, list[str]]:
    """(the model of a config.json, what was filled in, in words).

    The muP constants of a MiniCPM are in it, or are `known`; a Llama has none: its multipliers are 1, whatever else
    the file says. Raises UserError naming the key that is missing, impossible or not supported.
    """
    tree = read_json(path)
    kind = tree.get("model_type")
    if not isinstance(kind, str) or kind not in _TIED:
        raise UserError(f"{path}: model_type = {_short(kind)}; expected minicpm or llama")
    for key, supported in _SUPPORTED.items():
        if key in tree and tree[key] not in supported:
            raise UserError(f"{path}: {key} = {_short(tree[key])} is not supported; expected {supported[0]}")

    def number(key: str, whole: bool, value: Any) -> Any:
        kinds, largest = (int, 2**31 - 1) if whole else ((int, float), 1e38)
        if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) <= largest:
            raise UserError(f"{path}: {key} = {_short(value)}; expected a {'whole ' if whole else ''}number")
        return value if whole else float(value)

    missing = [key for key in _COUNTS.values() if key not in tree]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; expected the shape of the model")
    keys: dict[str, Any] = {ours: number(theirs, True, tree[theirs]) for ours, theirs in _COUNTS.items()}
    for ours, theirs in _OPTIONAL_COUNTS.items():
        if tree.get(theirs) is not None:
            keys[ours] = number(theirs, True, tree[theirs])
    if "head_width" in keys and keys["head_width"] * keys["heads"] == keys["width"]:
        del keys["head_width"]
    rope, said = _rope(tree, path)
    filled = []
    for ours, (theirs, default) in _DEFAULTS.items():
        given = rope.get(theirs, tree.get(theirs))
        if given is None and theirs != "initializer_range":
            filled.append(f"{theirs} {default:g}")
        keys[ours] = number(theirs, isinstance(default, int), default if given is None else given)
    keys["tied"] = tree.get("tie_word_embeddings", _TIED[kind])
    if not isinstance(keys["tied"], bool):
        raise UserError(f"{path}: tie_word_embeddings = {_short(keys['tied'])}; expected true or false")
    if "tie_word_embeddings" not in tree:
        filled.append(f"tie_word_embeddings {str(_TIED[kind]).lower()}")
    if "num_key_value_heads" not in tree:
        filled.append("num_key_value_heads as num_attention_heads")
    keys["rope_scaling"] = said
    if said != "none":
        keys["rope_factor"] = number("rope_scaling.factor", False, rope.get("factor"))

    config = ModelConfig(**keys)
    if kind == "minicpm":
        config = _mup_constants(tree, path, known, number).of(config)
    theirs_of = _COUNTS | _OPTIONAL_COUNTS | {ours: theirs for ours, (theirs, _) in _DEFAULTS.items()}
    for key, allowed in config.problems():
        raise UserError(f"{path}: {theirs_of.get(key, key)} = {getattr(config, key)}; expected {allowed}")
    if kind == "llama":
        config = as_llama(config, config.tied)
    return config, [f"{path.name} says nothing of {', '.join(filled)}: taken as transformers does"] if filled else []


def write_config(path: Path, config: ModelConfig, dtype: np.dtype, llama: bool, bos: int, eos: int) -> None:
    """config.json with the keys of the released one, and those that it leaves to defaults.

    Raises UserError for a model that the code of the release, or of Llama, cannot compute.
    """
    tree: dict[str, Any] = {"architectures": ["LlamaForCausalLM" if llama else "MiniCPMForCausalLM"]}
    if not llama:
        if config.head * config.heads != config.width:
            raise UserError(f"model.head_width = {config.head}: MiniCPM's own code knows only width / heads")
        modules = {
            "AutoConfig": "configuration_minicpm.MiniCPMConfig",
            "AutoModel": "modeling_minicpm.MiniCPMModel",
            "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
        }
        tree["auto_map"] = {name: f"{_CODE}--{code}" for name, code in modules.items()}
    tree |= {theirs: getattr(config, ours) for ours, theirs in _COUNTS.items()}
    tree |= {"num_key_value_heads": config.kv}
    if llama:
        tree["head_dim"] = config.head
    tree |= {theirs: getattr(config, ours) for ours, (theirs, _) in _DEFAULTS.items()}
    scaling = None if config.rope_scaling == "none" else {"type": config.rope_scaling, "factor": config.rope_factor}
    tree |= {
        "model_type": "llama" if llama else "minicpm",
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tied,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": _TORCH_TYPES[dtype],
        "use_cache": True,
    }
    if not llama:
        tree |= vars(constants(config))
    write_json(path, tree)


def _mup_constants(tree: dict[str, Any], path: Path, known: Constants | None, number: Any) -> Constants:
    missing = [key for key in _MUP if tree.get(key) is None]
    if not missing:
        base = number("dim_model_base", True, tree["dim_model_base"])
        return Constants(
            number("scale_emb", False, tree["scale_emb"]), number("scale_depth", False, tree["scale_depth"]), base
        )
    if known is not None:
        return known
    raise UserError(
        f"{path}: lacks {', '.join(missing)}, without which a MiniCPM computes something else; expected them there, or "
        f"--mup SCALE_EMB,SCALE_DEPTH,DIM_MODEL_BASE (12,1.4,256 in the release); weights that hold them already are a "
        f'Llama: "model_type": "llama"'
    )


def _rope(tree: dict[str, Any], path: Path) -> tuple[dict[str, Any], Any]:
    """(rope_scaling, or the rope_parameters of newer transformers; our name of its kind)."""
    rope = tree.get("rope_parameters") or tree.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling = {_short(rope)}; expected null or an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "dynamic"):
        raise UserError(f"{path}: rope_scaling of type {_short(kind)} is not supported; expected linear or dynamic")
    return rope, "none" if kind == "default" else kind


def _short(value: Any) -> str:
    return repr(value)[:60]
