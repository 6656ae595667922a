"""The command line: layers, exact round trips, and one-line errors that name the key, what is allowed, the nearest."""

from __future__ import annotations

import dataclasses
import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmjax.run import cli
from cpmjax.run.config import Config, DataConfig, EvaluationConfig, RunConfig
from cpmjax.run.errors import UserError
from cpmjax.run.identity import differences, encode, fingerprint
from cpmjax.run.schedule import WSD, WSDS, Constant, Cosine, CosineLoop
from cpmjax.run.sources import Jsonl, TextFolder

PRESETS: dict[str, dict[str, Any]] = {"small": {"width": 512, "layers": 8, "heads": 8}, "large": {"width": 1024}}
DATA = ["--data.corpora={docs: {type: text, path: /texts}}", "--data.stable={docs: 1}"]


def load(*argv: str) -> Config:
    return cli.load(argv, PRESETS, "usage: job")


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "experiment.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


CORPORA = "data: {corpora: {docs: {type: text, path: /texts}}, stable: {docs: 1}}\n"


# Layers.


def test_defaults_then_preset_then_file_then_command_line(experiment: Callable[[str], str]) -> None:
    path = experiment(CORPORA + "model: {preset: small, layers: 9}\ntraining: {batch_size: 4}\n")
    config = load(path, "--model.heads=16", "--optimizer.learning_rate", "1e-3")
    model = config.model
    assert (model.preset, model.width, model.layers, model.heads, model.context) == ("small", 512, 9, 16, 4096)
    assert config.optimizer.learning_rate == 0.001 and config.training.batch_size == 4
    assert config.data == DataConfig(corpora={"docs": TextFolder("/texts")}, stable={"docs": 1.0})
    assert type(config.data.stable["docs"]) is float


def test_overrides_come_in_any_order_and_form() -> None:
    ways = [
        ["--schedule.type=cosine", "--schedule.length=7"],
        ["--schedule.length", "7", "--schedule.type", "cosine"],
        ["--schedule={type: cosine, length: 7}"],
    ]
    assert {load(*DATA, *way).schedule for way in ways} == {Cosine(length=7)}
    assert (
        load(*DATA, "--mesh.data", "-1", "--training.batch_size=1", "--training.batch_size=2").training.batch_size == 2
    )


def test_another_type_replaces_the_section(experiment: Callable[[str], str]) -> None:
    path = experiment(CORPORA + "schedule: {type: wsd, warmup: 7, stable: 8}\n")
    assert load(path).schedule == WSD(7, 8)
    assert load(path, "--schedule.type=constant").schedule == Constant()


@pytest.mark.parametrize(
    ("text", "number"), [("1e-3", 1e-3), ("1E5", 1e5), (".5e-2", 5e-3), ("1.e+2", 100.0), ("3", 3.0), ("-2.5", -2.5)]
)
def test_numbers_as_people_write_them(text: str, number: float) -> None:
    if number > 0:
        assert load(*DATA, f"--optimizer.learning_rate={text}").optimizer.learning_rate == number
    else:
        assert f"= {number}" in refused(*DATA, f"--optimizer.learning_rate={text}")


def test_text_that_is_no_yaml_is_text() -> None:
    corpora = load(*DATA, "--data.corpora.docs.glob=*.py").data.corpora
    assert corpora["docs"] == TextFolder("/texts", "*.py")


def test_cycles_and_lists() -> None:
    config = load(*DATA, "--schedule={type: wsd_s, cycles: [[5, 1], [6, 2]]}", "--checkpoint.steps=[3, 4]")
    assert config.schedule == WSDS(cycles=((5, 1), (6, 2))) and config.checkpoint.steps == (3, 4)


# Errors.


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--model.widht=3", ["model.widht", "nearest: width", "heads", "command line"]),
        ("--modle.width=3", ["modle", "nearest: model", "training"]),
        ("--width=3", ["width", "no such key", "model"]),
        ("--data.tokenizer.pth=x", ["data.tokenizer.pth", "nearest: path", "sample_bytes"]),
        ("--data.corpora.docs.pth=x", ["data.corpora.docs.pth", "nearest: path", "glob"]),
        ("--data.corpora.docs.field=x", ["data.corpora.docs.field", "one of type, on_end, path, glob"]),
        ("--schedule.half_period=3", ["schedule.half_period", "one of type, unit, warmup"]),
        ("--schedule.type=wds", ["schedule.type", "wsd, wsd_s, cosine", "nearest: wsd"]),
        ("--schedule.type=7", ["schedule.type = 7", "wsd_s"]),
        ("--optimizer.type=lyon", ["optimizer.type = 'lyon'", "adamw, lion", "nearest: lion"]),
        ("--optimizer={type: lion, epsilon: 1}", ["optimizer.epsilon", "one of type, learning_rate"]),
        ("--optimizer={type: muon, momentum: 1}", ["optimizer.momentum = 1.0", "from 0 to below 1"]),
        ("--optimizer={type: adafactor, update_clip: 0}", ["optimizer.update_clip = 0.0", "a positive number"]),
        ("--optimizer={type: schedule_free, beta1: 0}", ["optimizer.beta1 = 0.0", "more than 0"]),
        ("--training.ema=1", ["training.ema = 1.0", "between 0 and 1, or null"]),
        ("--optimizer.state_dtype=float16", ["optimizer.state_dtype", "float32, bfloat16"]),
        ("--data.corpora.more={path: x}", ["data.corpora.more.type = null", "jsonl"]),
        ("--compute.remat=blok", ["compute.remat = 'blok'", "none, block, dots", "nearest: block"]),
        ("--compute.attention=flash", ["compute.attention = 'flash'", "auto, plain, chunked, cudnn, triton, splash"]),
        ("--compute.remat=true", ["compute.remat = true", "none, block, dots"]),
        ("--model.width=null", ["model.width = null", "a whole number"]),
        ("--model.width=true", ["model.width = true", "a whole number"]),
        ("--model.width=3.7", ["model.width = 3.7", "a whole number"]),
        ("--model.width=wide", ["model.width = 'wide'", "a whole number"]),
        ("--model.width={a: 1}", ["model.width = {'a': 1}", "a whole number"]),
        ("--model.kv_heads=two", ["model.kv_heads = 'two'", "a whole number or null"]),
        ("--model.tied=1", ["model.tied = 1", "true or false"]),
        ("--model.scale_emb=true", ["model.scale_emb = true", "a number"]),
        ("--model=3", ["model = 3", "a mapping of keys"]),
        ("--schedule=wsd", ["schedule = 'wsd'", "a mapping of keys"]),
        ("--data.stable=docs", ["data.stable = 'docs'", "a mapping of names"]),
        ("--data.stable={docs: lots}", ["data.stable.docs = 'lots'", "a number"]),
        ("--data.stable={1: 2}", ["data.stable: the name 1", "text"]),
        ("--run.accept_changes=model", ["run.accept_changes = 'model'", "a list"]),
        ("--checkpoint.steps=[1, x]", ["checkpoint.steps[1] = 'x'", "a whole number"]),
        ("--schedule={type: wsd_s, cycles: [[1]]}", ["schedule.cycles[0] = [1]", "a list of 2"]),
        ("--run.directory=7", ["run.directory = 7", "text"]),
        ("--model.preset=smal", ["model.preset = 'smal'", "small, large", "nearest: small"]),
        ("--checkpoint.folder=on/disk", ["checkpoint.folder = 'on/disk'", "an absolute path, or a URL"]),
        ("--model.width=-4", ["model.width = -4", "a positive whole number"]),
        ("--schedule.floor=2", ["schedule.floor = 2.0", "from 0 to 1"]),
        ("--data.stable.dcos=1", ["data.stable.dcos", "one of data.corpora: docs"]),
        ("--data.stable={docs: 0}", ["data.stable = {'docs': 0.0}", "a positive weight"]),
        ("--data.decay={docs: -0.0}", ["data.decay = {'docs': -0.0}", "a positive weight"]),
        ("--data.stable.docs=-1", ["data.stable.docs = -1", "a positive weight"]),
        ("--data.stable.docs=.nan", ["data.stable.docs = nan", "a positive weight"]),
        ("--data.stable.docs=.inf", ["data.stable.docs = inf", "a positive weight"]),
        ("--data.corpora.more={type: text, path: /texts}", ["data.corpora.more", "than data.corpora.docs", "the same"]),
        ("--data.corpora.more={type: parquet}", ["data.corpora.more.path = ''", "a file or folder"]),
        ("--data.corpora.more={type: huggingface}", ["data.corpora.more.name = ''", "a dataset"]),
        ("--data.corpora={a.b: {type: jsonl}}", ["data.corpora.a.b.path = ''", "a file or folder"]),
        ("--data={corpora: {a.b: {type: text, path: /x}}, stable: {a.b: -1}}", ["data.stable.a.b = -1", "positive"]),
        ("--data.stable={a: 1, a: 2}", ["--data.stable={a: 1, a: 2}: the key a is there twice", "each key once"]),
        ("--model.width", ["--model.width has no value", "--model.width=VALUE"]),
        ("--model.width=", ["--model.width has no value"]),
        ("-v", ["unknown flag -v", "--section.key=value"]),
        ("--", ["unknown flag --"]),
        ("--model..width=3", ["unknown flag --model..width"]),
    ],
)
def test_one_line_names_key_and_what_is_allowed(argument: str, parts: list[str]) -> None:
    message = refused(*DATA, argument)
    for part in parts:
        assert part in message


def test_an_optimizer_with_a_parametrisation_that_is_not_muP_for_it_is_refused() -> None:
    arguments = (*DATA, "--model.parametrisation=minicpm_table7")
    assert load(*arguments).model.parametrisation == "minicpm_table7"
    assert refused(*arguments, "--optimizer.type=lion") == (
        "model.parametrisation = 'minicpm_table7': expected one of minicpm, standard with optimizer.type=lion"
    )
    own = refused(*DATA, "--training.ema=0.9", "--optimizer.type=schedule_free")
    assert own.startswith("training.ema = 0.9: expected null with optimizer.type=schedule_free")


def test_the_steps_of_a_trace(parent: Path) -> None:
    def at(steps: str) -> Config:
        return load(*DATA, f"--log.profile_steps={steps}")

    total = Config().schedule.total
    assert list(at("10:13").log.profiled) == [10, 11, 12, 13]  # 613 in YAML 1.1
    assert list(at(f"{total}:{total}").log.profiled) == [total]
    assert list(at("null").log.profiled) == []
    for wrong in ("13:10", "a:b", "0:3", "10", "-1:3", "1:2:3", "10:", "1:2.5"):
        message = refused(*DATA, f"--log.profile_steps={wrong}")
        assert wrong in message and ("FIRST:LAST" in message or "expected text" in message)
    assert refused(*DATA, f"--log.profile_steps=10:{total + 1}") == (
        f"log.profile_steps = '10:{total + 1}': expected steps up to {total}, the last"
    )
    assert fingerprint(at("10:13")) == fingerprint(at("null"))
    assert differences(encode(at("10:13")), encode(at("null"))) == {}
    traced = load(*DATA, "--schedule={warmup: 10, stable: 90, decay: 20}", "--log.profile_steps=10:13")
    (parent / "config.yaml").write_text(cli.dump(traced))
    assert cli.read_yaml(parent / "config.yaml")["log"]["profile_steps"] == "10:13"
    assert load(*branch(parent)).log.profile_steps is None  # a branch counts its own steps


def test_a_flag_is_no_value() -> None:
    assert "--model.width has no value" in refused(*DATA, "--model.width", "--model.heads=2")


def test_two_experiments() -> None:
    assert "at most one experiment, got a.yaml, b.yaml" in refused("a.yaml", "b.yaml")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model:\n  width: 3\n  widht: 4\n", ["model.widht", "nearest: width"]),
        ("model:\n  width: 3\n  heads: [1\n", ["line 4", "expected YAML"]),
        ("model:\n  width: 3\n\twidth: 3\n", ["line 3"]),
        ("model:\n  width: 3\n  width: 4\n", ["line 3", "the key width is there twice"]),
        ("run: {seed: 1}\nmodel: {}\nrun: {seed: 2}\n", ["line 3", "the key run is there twice"]),
        ("model: *anchor\n", ["line 1", "anchor"]),
        ("a: 1\n---\nb: 2\n", ["line 2"]),
        ("- model\n", ["mapping of sections", "['model']"]),
        ("just text\n", ["mapping of sections", "'just text'"]),
        ("# nothing\n", ["mapping of sections", "null"]),
        ("model:\n", ["model = null", "a mapping of keys"]),
        ("5: {}\n", ["5: no such key"]),
        ("model: \x07\n", ["expected YAML"]),
    ],
)
def test_files_that_are_no_experiment(experiment: Callable[[str], str], text: str, parts: list[str]) -> None:
    path = experiment(text)
    message = refused(path)
    for part in [path, *parts]:
        assert part in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert str(missing) in refused(str(missing)) and "No such file" in refused(str(missing))
    assert "directory" in refused(str(tmp_path))
    missing.write_bytes(b"run: {seed: 1}\n# \xff\n")
    assert "byte 17 is not UTF-8" in refused(str(missing))


keys = st.sampled_from(["model", "width", "schedule", "type", "data", "corpora", "stable", "run", "seed", "wsd", "x"])
leaves = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.sampled_from(["wsd", "text", "none", "1e3"])
trees = st.recursive(leaves, lambda inner: st.dictionaries(keys, inner, max_size=3) | st.lists(inner, max_size=3))


@settings(deadline=None)
@given(st.dictionaries(keys, trees, max_size=4))
def test_any_tree_gives_a_configuration_or_one_line(tree: dict[str, Any]) -> None:
    try:
        config = cli.decode(tree, "any.yaml")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(config, Config)


# dump and load.

texts = st.text(st.characters(codec="utf-8"), max_size=30)
awkward = st.sampled_from(
    ["1e3", "1.5E-7", "yes", "null", "~", "", " x ", "a: b", "# no", "2024-01-01", "1:30", "*.py", "a\x85b"]
)
names = texts | awkward
shares = st.floats(1e-12, 1e12)


@settings(deadline=None, max_examples=40)
@given(
    directory=names.filter(bool),
    prompts=st.lists(names, max_size=3).map(tuple),
    weights=st.dictionaries(names, shares, min_size=1, max_size=3),
    schedule=st.sampled_from(
        [
            WSD(1, 2, 3, "half_life", half_life=1e-7, unit="tokens"),
            WSDS(cycles=((1, 2), (3, 4))),
            Cosine(floor=1 / 3),
            CosineLoop(),
        ]
    ),
    temperature=st.floats(0, allow_nan=False),
)
def test_dump_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    directory: str,
    prompts: Any,
    weights: Any,
    schedule: Any,
    temperature: float,
) -> None:
    config = dataclasses.replace(
        Config(),
        run=RunConfig(directory=directory, seed=2**32 - 1),
        data=DataConfig(corpora={name: Jsonl(f"p{name}") for name in weights}, stable=weights),
        schedule=schedule,
        evaluation=EvaluationConfig(prompts=prompts, temperature=temperature),
    )
    text = cli.dump(config)
    assert text.splitlines()[0] == f"# fingerprint: {fingerprint(config)}"
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    assert load(str(path)) == config
    assert cli.decode(cli.read_yaml(path), "dumped.yaml") == config
    assert yaml.safe_load(text) == encode(config)  # other readers of YAML find the same


def test_a_preset_is_resolved_in_the_dump(experiment: Callable[[str], str]) -> None:
    config = load(*DATA, "--model.preset=small", "--model.layers=3")
    assert load(experiment(cli.dump(config))) == config


# Branches.


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    directory = tmp_path / "trunk"
    directory.mkdir()
    arguments = ["--schedule={warmup: 10, stable: 90, decay: 20}", "--run.seed=7", "--run.accept_changes=[model]"]
    config = load(*DATA, *arguments, f"--run.directory={directory}", "--model.width=64")
    (directory / "config.yaml").write_text(cli.dump(config))
    return directory


def branch(parent: Path, *more: str) -> list[str]:
    return [f"--branch.run={parent}", "--branch.step=50", f"--run.directory={parent.parent / 'branch'}", *more]


def test_a_branch_begins_its_decay_at_its_step(parent: Path) -> None:
    config = load(*branch(parent))
    assert config.schedule == WSD(10, 40, 20)
    assert (config.run.seed, config.model.width, config.run.accept_changes) == (7, 64, ())
    assert (config.branch.run, config.branch.step) == (str(parent), 50)
    assert config.run.directory == str(parent.parent / "branch")


def test_a_branch_changes_what_it_says(parent: Path, experiment: Callable[[str], str]) -> None:
    path = experiment(f"branch: {{run: {parent}, step: 50}}\nschedule: {{decay: 5, shape: linear}}\nrun: {{seed: 8}}\n")
    config = load(path, f"--run.directory={parent.parent / 'branch'}")
    assert config.schedule == WSD(10, 40, 5, "linear") and config.run.seed == 8


def test_a_branch_may_choose_its_stable_stage_or_another_schedule(parent: Path) -> None:
    assert load(*branch(parent, "--schedule.stable=500")).schedule == WSD(10, 500, 20)
    assert load(*branch(parent, "--schedule.type=constant")).schedule == Constant()


def test_a_branch_of_a_constant_trunk(parent: Path) -> None:
    config = load(*DATA, "--schedule={type: constant, warmup: 10, length: 5000}", f"--run.directory={parent}")
    (parent / "config.yaml").write_text(cli.dump(config))
    assert load(*branch(parent, "--schedule={type: wsd, warmup: 10, decay: 7}")).schedule == WSD(10, 40, 7)


def test_a_branch_of_a_schedule_in_tokens(parent: Path) -> None:
    tokens = 16 * 256  # a step of the defaults
    schedule = f"--schedule={{unit: tokens, warmup: {10 * tokens}, stable: {90 * tokens - 1}, decay: {20 * tokens}}}"
    (parent / "config.yaml").write_text(cli.dump(load(*DATA, schedule)))
    assert load(*branch(parent)).schedule == WSD(10, 40, 20)


def test_the_dump_of_a_branch_reads_back_equal(parent: Path, experiment: Callable[[str], str]) -> None:
    config = load(*branch(parent, "--schedule.decay=5"))
    path = experiment(cli.dump(config))
    assert load(path) == config
    (parent / "config.yaml").unlink()
    assert cli.decode(cli.read_yaml(Path(path)), path) == config


def test_branches_that_cannot_be(parent: Path, tmp_path: Path) -> None:
    run = f"--branch.run={parent}"
    own = f"--run.directory={tmp_path / 'branch'}"
    assert "branch.step = null" in refused(run, own)
    assert "run.directory = null" in refused(run, "--branch.step=50")
    assert "a directory of its own" in refused(run, "--branch.step=50", f"--run.directory={parent}/../trunk")
    assert "branch.step = 5: expected 10" in refused(run, own, "--branch.step=5")
    assert "branch.step = 'late'" in refused(run, own, "--branch.step=late")
    empty = tmp_path / "empty"
    assert str(empty / "config.yaml") in refused(f"--branch.run={empty}", own, "--branch.step=50")
    (parent / "config.yaml").write_text("model: {widht: 3}\n")
    message = refused(run, own, "--branch.step=50")
    assert str(parent / "config.yaml") in message and "model.widht" in message


# Help and the end of a job.


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("nowhere.yaml", "--help")
    out = capsys.readouterr().out
    assert caught.value.code == 0 and out.startswith("usage: job")
    for key in ("--model.width=128", "--branch.run=null", "--schedule.half_life=null", "--data.corpora.NAME.glob="):
        assert key in out
    assert "none | block | dots" in out and "muP base width" in out


def job_that_raises(error: BaseException) -> Callable[[list[str]], int | None]:
    def job(argv: list[str]) -> int | None:
        raise error

    return job


def wrapped(error: Exception) -> Exception:
    outer = ValueError("could not save")
    outer.__cause__ = error
    return outer


FULL = OSError(errno.ENOSPC, "No space left on device", "/disk/metrics.jsonl")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("model.width = 0: expected\nmore"), 2, "error: model.width = 0: expected more\n"),
        (FULL, 2, "error: no space left on the disk that holds /disk/metrics.jsonl: "),
        (wrapped(FULL), 2, "error: no space left on the disk that holds /disk/metrics.jsonl: "),
        (ValueError("RESOURCE_EXHAUSTED: /disk/x: No space left on device"), 2, "error: no space left on the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "/disk/x"), 2, "error: /disk/x: Permission denied\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(job_that_raises(error))
    err = capsys.readouterr().err
    assert caught.value.code == code and err.startswith(message) and err.count("\n") == bool(message)


@pytest.mark.parametrize("bug", [ValueError("a bug"), OSError("no file"), KeyError("k")])
def test_bugs_keep_their_traceback(bug: Exception) -> None:
    with pytest.raises(type(bug)):
        cli.main(job_that_raises(bug))


def test_a_job_ends_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(sys, "argv", ["job", "a", "--b"])
    for code in (None, 0, 3):
        with pytest.raises(SystemExit) as caught:
            cli.main(lambda argv, code=code: seen.append(argv) or code)  # type: ignore[misc]
        assert caught.value.code == code
    assert seen == [["a", "--b"]] * 3


def test_import_starts_no_backend() -> None:
    code = (
        "import sys, cpmjax.run.cli, cpmjax.run.directory, cpmjax.run.plots\n"
        "bridge = sys.modules.get('jax._src.xla_bridge')\n"
        "sys.exit(bool(bridge and bridge._backends))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(cli.__file__).parents[2]).returncode == 0
