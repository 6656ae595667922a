"""config.json: what released files say and leave out, and one line for each thing that cannot be right."""

from __future__ import annotations

import dataclasses
import json
import math

import golden_models
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpmjax.formats.config_files import read_config, write_config
from cpmjax.formats.fold import Constants, as_llama
from cpmjax.formats.loading import open_stored
from cpmjax.model import mup
from cpmjax.model.presets import PRESETS
from cpmjax.model.weights import BFLOAT16, FLOAT32
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError

# As the repositories have them, without keys that say nothing of the model.
RELEASED = {
    "minicpm-2b": {
        "architectures": ["MiniCPMForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 2304,
        "initializer_range": 0.1,
        "intermediate_size": 5760,
        "max_position_embeddings": 4096,
        "model_type": "minicpm",
        "num_attention_heads": 36,
        "num_hidden_layers": 40,
        "num_key_value_heads": 36,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 122753,
        "scale_emb": 12,
        "dim_model_base": 256,
        "scale_depth": 1.4,
    }
}
RELEASED["minicpm-1b"] = RELEASED["minicpm-2b"] | {
    "hidden_size": 1536,
    "intermediate_size": 3840,
    "num_attention_heads": 24,
    "num_hidden_layers": 52,
    "num_key_value_heads": 8,
    "vocab_size": 73440,
}
RELEASED["minicpm-2b-128k"] = RELEASED["minicpm-2b"] | {
    "vocab_size": 122760,
    "max_length": 131072,
    "max_position_embeddings": 65536,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "dynamic", "factor": 4.0},
    "tie_word_embeddings": False,
}
TINY = RELEASED["minicpm-2b"] | {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA = {key: value for key, value in TINY.items() if key not in ("scale_emb", "scale_depth", "dim_model_base")} | {
    "model_type": "llama"
}
SHAPE = ModelConfig(vocabulary=20, width=16, feed_forward=24, layers=2, heads=4, kv_heads=2)


@pytest.fixture
def read(tmp_path):
    """Reads a tree, without some keys of it, as a config.json."""

    def reading(tree, *without, known=None, **changes):
        tree = {key: value for key, value in (tree | changes).items() if key not in without}
        (tmp_path / "config.json").write_text(json.dumps(tree))
        return read_config(tmp_path / "config.json", known)

    return reading


def refusal(read, *arguments, **changes) -> str:
    with pytest.raises(UserError) as caught:
        read(*arguments, **changes)
    message = str(caught.value)
    assert "config.json: " in message and "; expected " in message and "\n" not in message and len(message) < 600
    return message.partition("config.json: ")[2]


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_are_the_presets(read, name):
    config, _ = read(RELEASED[name])
    assert config == ModelConfig(**{"kv_heads": 36} | PRESETS[name])
    assert (config.scale_emb, config.scale_depth, config.dim_model_base) == (12.0, 1.4, 256)
    assert config.parametrisation == "minicpm" and config.tied == (name != "minicpm-2b-128k")


def test_what_a_file_leaves_out_is_filled_in_and_said(read):
    config, notes = read(TINY, "max_position_embeddings", "rms_norm_eps", "num_key_value_heads")
    assert (config.rope_theta, config.tied, config.kv, config.context, config.norm_epsilon) == (
        1e4,
        True,
        4,
        2048,
        1e-6,
    )
    assert notes == [
        "config.json says nothing of max_position_embeddings 2048, rms_norm_eps 1e-06, rope_theta 10000, "
        "tie_word_embeddings true, num_key_value_heads as num_attention_heads: taken as transformers does"
    ]


def test_a_complete_file_leaves_nothing_to_say(read):
    assert read(TINY, rope_theta=1e4, tie_word_embeddings=True)[1] == []


def test_a_llama_is_untied_by_default_and_has_no_multipliers(read):
    config, _ = read(LLAMA)
    assert config == as_llama(dataclasses.replace(SHAPE, tied=False), tied=False)
    assert tuple(mup.multipliers(config)) == (1, 1, 1)


def test_a_llama_that_still_lists_the_constants_holds_them_in_its_weights(read):
    """As the released Llama-format folders do: applied again, they would count twice."""
    assert read(LLAMA, scale_emb=12, scale_depth=1.4, dim_model_base=256)[0] == read(LLAMA)[0]


def test_heads_of_their_own_width(read):
    assert read(LLAMA, head_dim=10)[0].head == 10
    assert read(LLAMA, head_dim=4)[0] == read(LLAMA)[0] == read(LLAMA, head_dim=None)[0]


@pytest.mark.parametrize(("keys", "expected"), [
    ({"rope_scaling": {"type": "linear", "factor": 2}}, ("linear", 2.0, 1e4)),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "rope_theta": 1e6}, ("dynamic", 4.0, 1e6)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, ("none", 1.0, 5e5)),
    ({"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}, ("linear", 8.0, 1e6)),
])  # fmt: skip
def test_rotary_embeddings_as_old_and_new_transformers_spell_them(read, keys, expected):
    config, _ = read(TINY, **keys)
    assert (config.rope_scaling, config.rope_factor, config.rope_theta) == expected


@pytest.mark.parametrize("llama", [False, True])
@pytest.mark.parametrize("scaling", ["none", "linear", "dynamic"])
def test_written_and_read(tmp_path, llama, scaling):
    config = dataclasses.replace(
        SHAPE, tied=False, context=99, norm_epsilon=3e-6, rope_theta=7e5, rope_scaling=scaling, init_std=0.02,
        rope_factor=1.0 if scaling == "none" else 3.0, scale_emb=7.5, scale_depth=0.9, dim_model_base=5,
        head_width=6 if llama else None,
    )  # fmt: skip
    config = as_llama(config, tied=False) if llama else config
    write_config(tmp_path / "config.json", config, BFLOAT16, llama, 1, 2)
    assert read_config(tmp_path / "config.json") == (config, [])
    tree = json.loads((tmp_path / "config.json").read_text())
    assert tree["torch_dtype"] == "bfloat16" and tree["model_type"] == ("llama" if llama else "minicpm")


def test_what_is_written_has_the_keys_of_the_release(tmp_path):
    config = ModelConfig(**PRESETS["minicpm-2b"])
    write_config(tmp_path / "config.json", config, BFLOAT16, False, 1, 2)
    tree = json.loads((tmp_path / "config.json").read_text())
    released = {key: value for key, value in RELEASED["minicpm-2b"].items() if key != "auto_map"}
    assert tree.items() >= released.items()
    assert "--modeling_minicpm.MiniCPMForCausalLM" in tree["auto_map"]["AutoModelForCausalLM"]


def test_transformers_reads_a_llama_config(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    config = as_llama(dataclasses.replace(SHAPE, head_width=6, rope_theta=7e5), tied=True)
    write_config(tmp_path / "config.json", config, FLOAT32, True, 1, 2)
    found = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (found.head_dim, found.num_key_value_heads, found.tie_word_embeddings) == (6, 2, True)
    assert found.rope_parameters["rope_theta"] == 7e5 and found.model_type == "llama"


def test_a_head_width_that_the_code_of_the_release_does_not_know(tmp_path):
    with pytest.raises(UserError, match=r"^model.head_width = 6: MiniCPM's own code knows only width / heads"):
        write_config(tmp_path / "config.json", dataclasses.replace(SHAPE, head_width=6), FLOAT32, False, 1, 2)


# What is refused.


def test_missing_constants_are_asked_for_with_the_ways_out(read):
    message = refusal(read, TINY, "scale_emb", "dim_model_base")
    assert message.startswith("lacks scale_emb, dim_model_base, without which a MiniCPM computes something else")
    assert "--mup SCALE_EMB,SCALE_DEPTH,DIM_MODEL_BASE (12,1.4,256 in the release)" in message
    assert '"model_type": "llama"' in message


def test_constants_that_are_given_fill_the_gap_and_nothing_else(read):
    known = Constants(3.0, 0.5, 8)
    assert known.of(read(TINY)[0]) == read(TINY, "scale_emb", known=known)[0]
    assert read(TINY, known=known)[0] == read(TINY)[0]


def test_a_missing_shape_lists_its_keys(read):
    assert refusal(read, TINY, "vocab_size", "num_hidden_layers") == (
        "lacks vocab_size, num_hidden_layers; expected the shape of the model"
    )


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "minicpm3"}, "model_type = 'minicpm3'; expected minicpm or llama"),
    ({"model_type": None}, "model_type = None; expected minicpm or llama"),
    ({"model_type": ["minicpm"]}, "model_type = ['minicpm']; expected minicpm or llama"),
    ({"num_experts": 8, "num_experts_per_tok": 2}, "num_experts = 8 is not supported; expected 0"),
    ({"quantization_config": {"bits": 4, "quant_method": "gptq"}}, "quantization_config = {'bits': 4"),
    ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported; expected silu"),
    ({"hidden_act": ["silu"]}, "hidden_act = ['silu'] is not supported; expected silu"),
    ({"attention_bias": True}, "attention_bias = True is not supported; expected False"),
    ({"mlp_bias": True}, "mlp_bias = True is not supported; expected False"),
    ({"sliding_window": 4096}, "sliding_window = 4096 is not supported; expected None"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported; expected 1"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling of type 'yarn' is not supported; expected linear"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling of type 'longrope' is not supported"),
    ({"rope_parameters": {"rope_type": ["linear"]}}, "rope_scaling of type ['linear'] is not supported"),
    ({"rope_scaling": "linear"}, "rope_scaling = 'linear'; expected null or an object"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor = None; expected a number"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_factor = 0.5; expected 1 or more"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'; expected true or false"),
    ({"hidden_size": 18}, "hidden_size = 18; expected a multiple of model.heads = 4"),
    ({"num_key_value_heads": 3}, "num_key_value_heads = 3; expected a divisor of model.heads = 4"),
    ({"num_key_value_heads": 0}, "num_key_value_heads = 0; expected a divisor"),
    ({"head_dim": 3}, "head_dim = 3; expected an even number"),
    ({"rms_norm_eps": 0}, "rms_norm_eps = 0.0; expected a positive number"),
    ({"scale_depth": -1.4}, "scale_depth = -1.4; expected a positive number"),
    ({"dim_model_base": 0}, "dim_model_base = 0; expected a positive whole number"),
])  # fmt: skip
def test_what_we_do_not_compute(read, changes, message):
    assert message in refusal(read, TINY, **changes)


@pytest.mark.parametrize("tree", [TINY, LLAMA], ids=["minicpm", "llama"])
@pytest.mark.parametrize("value", [True, "16", 16.0, None, -1, 0, 2**60, 10**400, float("nan"), [16]], ids=str)
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"])
def test_hostile_counts(read, tree, key, value):
    assert refusal(read, tree, **{key: value}).startswith(f"{key} = ")


@pytest.mark.parametrize("value", [True, "1", math.inf, -math.inf, math.nan, 10**400, -(10**400), [1.0], {}], ids=str)
@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "scale_emb", "scale_depth", "initializer_range"])
def test_hostile_numbers(read, key, value):
    assert refusal(read, TINY, **{key: value}).startswith(f"{key} = ")


def test_an_exponent_beyond_every_number(tmp_path):
    text = json.dumps(TINY | {"rope_theta": "HERE"}).replace('"HERE"', "1e400")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="rope_theta = inf; expected a number"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    "text", [b"", b"[1]", b"{", b'{"a": 1' + b"0" * 5000 + b"}", b"[" * 10**5, b"\xff\xfe", b" " * 2**21]
)
def test_a_file_that_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match="expected a JSON object"):
        read_config(tmp_path / "config.json")


def test_any_values_are_a_config_or_one_line(read):
    """Whatever stands behind the keys that are looked at: never another exception."""
    keys = [*TINY, "head_dim", "rope_theta", "rope_parameters", "tie_word_embeddings", "num_experts", "mlp_bias"]
    numbers = st.one_of(st.integers(-3, 40), st.integers(), st.floats())
    leaves = st.one_of(numbers, st.booleans(), st.none(), st.sampled_from(["silu", "llama", "linear", "dynamic", ""]))
    rope = st.fixed_dictionaries(
        {}, optional={"type": leaves, "rope_type": leaves, "factor": leaves, "rope_theta": leaves}
    )
    values = st.one_of(leaves, rope, st.lists(leaves, max_size=2))

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from([TINY, LLAMA]), st.dictionaries(st.sampled_from(keys), values, max_size=3))
    def check(tree, changes):
        try:
            config, _ = read(tree | changes)
        except UserError as error:
            assert "\n" not in str(error) and "; expected " in str(error)
        else:
            assert not list(config.problems())

    check()


def test_a_tokenizer_with_more_tokens_than_there_are_rows(tmp_path):
    source = golden_models.folder("minicpm-tiny-a")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(
        (golden_models.folder("minicpm-tiny-history") / "tokenizer.model").read_bytes()
    )
    assert open_stored(tmp_path).tokenizer.vocabulary == 503
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 503}))
    with pytest.raises(UserError, match="tokenizer has 504 tokens; expected at most the 503 rows"):
        open_stored(tmp_path)
