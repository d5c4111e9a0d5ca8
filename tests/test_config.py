"""config.py: every mistake is one line that names file, key, value and what is allowed."""

import pickle
from pathlib import Path

import pytest

from epv2_plugin import CommunicationTimeout
from epv2_plugin.config import ConfigError, PluginConfig, Section, load_config, parse

CONFIGS = Path(__file__).parent.parent / "configs"


def error_of(tmp_path: Path, text: str) -> ConfigError:
    path = tmp_path / "plugin.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.source == str(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def test_empty_file_is_the_defaults(tmp_path):
    path = tmp_path / "plugin.yaml"
    path.write_text("# nothing\n")
    defaults = PluginConfig().model_dump()
    assert all(load_config(empty).model_dump() == defaults for empty in (path, None, {}))


def test_auto_may_be_written_out_and_numbers_keep_their_bounds(tmp_path):
    path = tmp_path / "plugin.yaml"
    path.write_text(
        "parallel: {expert: auto, tensor: 2}\nnetwork: {rdma_gbytes_per_s: auto, scale_up_gbytes_per_s: 450}"
    )
    config = load_config(path)
    assert config.parallel.expert == "auto"
    assert config.parallel.tensor == 2
    assert config.network.scale_up_gbytes_per_s == 450.0


@pytest.mark.parametrize(
    ("text", "key", "value", "allowed"),
    [
        ("paralel: {expert: 2}", "paralel", {"expert": 2}, "did you mean 'parallel'"),
        ("parallel: {expret: 2}", "parallel.expret", 2, "did you mean 'expert'"),
        ("parallel: {zzz: 2}", "parallel.zzz", 2, "allowed: expert, pipeline, context, tensor, virtual_pipeline"),
        ("parallel: {expert: '4'}", "parallel.expert", "4", "must be a valid integer or must be 'auto'"),
        ("parallel: {expert: 0}", "parallel.expert", 0, "greater than or equal to 1"),
        ("parallel: {expert: true}", "parallel.expert", True, "must be a valid integer"),
        ("parallel: {expert: 1.5}", "parallel.expert", 1.5, "must be a valid integer"),
        ("parallel: 4", "parallel", 4, "must be a mapping of keys to values"),
        ("backend: gpu", "backend", "gpu", "must be 'auto', 'cuda' or 'host'"),
        ("sm_budget: {pipeline: -1}", "sm_budget.pipeline", -1, "greater than or equal to 0"),
        ("network: {rdma_gbytes_per_s: 0}", "network.rdma_gbytes_per_s", 0, "greater than 0"),
        ("network: {rdma_gbytes_per_s: .inf}", "network.rdma_gbytes_per_s", float("inf"), "finite"),
        ("expert: {host_sync: 1}", "expert.host_sync", 1, "must be a valid boolean"),
        ("[1, 2]", "(top level)", [1, 2], "must be a mapping"),
        ("just words", "(top level)", "just words", "must be a mapping"),
    ],
)
def test_mistakes_are_located(tmp_path, text, key, value, allowed):
    error = error_of(tmp_path, text)
    assert error.key == key
    assert error.value == value
    assert allowed in error.allowed


def test_keys_that_are_not_words_are_refused(tmp_path):
    assert "Keys should be strings" in str(error_of(tmp_path, "1: 2\n"))
    assert "Keys should be strings" in str(error_of(tmp_path, "parallel: {1: 2}\n"))
    assert "keys must be words" in str(error_of(tmp_path, "? [a, b]\n: 2\n"))


def test_duplicate_keys_are_refused(tmp_path):
    assert "'expert' appears twice" in str(error_of(tmp_path, "parallel: {expert: 2, expert: 4}"))


def test_yaml_that_is_not_yaml_names_the_line(tmp_path):
    assert error_of(tmp_path, "backend: host\nparallel: {expert: 2").key.startswith("line ")
    assert "not valid YAML" in str(error_of(tmp_path, "backend: @host"))


def test_files_that_cannot_be_read(tmp_path):
    for path, reason in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=reason) as caught:
            load_config(path)
        assert caught.value.source == str(path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(binary)


@pytest.mark.parametrize(
    ("parallel", "facts", "key", "allowed"),
    [
        ({"expert": 3}, {"num_experts": 16}, "parallel.expert", "must divide the 16 experts"),
        ({"expert": 4}, {"world_size": 6}, "parallel.expert", "world size of 6"),
        ({"expert": 4, "pipeline": 2}, {"world_size": 4}, "parallel.expert", "times pipeline 2"),
        ({"expert": 4}, {"world_size": 4, "expert_tensor": 2}, "parallel.expert", "world size of 4"),
        ({"tensor": 3}, {"world_size": 4}, "parallel.tensor", "must divide the world size"),
        ({"tensor": 2, "context": 4}, {"world_size": 4}, "parallel.context", "must divide the world size"),
        ({"pipeline": 8}, {"world_size": 4}, "parallel.pipeline", "must divide the world size"),
    ],
)
def test_degrees_that_do_not_fit(parallel, facts, key, allowed):
    config = load_config({"parallel": parallel})
    with pytest.raises(ConfigError) as caught:
        config.check(**facts)
    assert caught.value.key == key
    assert allowed in caught.value.allowed
    assert caught.value.value == parallel[key.removeprefix("parallel.")]


def test_sm_budget_above_the_device():
    config = load_config({"sm_budget": {"expert": 200}})
    config.check(device_sms=None)
    with pytest.raises(ConfigError, match=r"sm_budget.expert = 200: at most the device's 132 SMs"):
        config.check(device_sms=132)
    load_config({"sm_budget": {"expert": 132}}).check(device_sms=132)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("cpu", {"world_size": 3}),
        ("nvlink_8gpu", {"world_size": 8, "num_experts": 64, "device_sms": 132}),
        ("multinode_hybrid", {"world_size": 2048, "num_experts": 256, "device_sms": 132}),
    ],
)
def test_sample_configs_load_and_comment_every_key(name, facts):
    path = CONFIGS / f"{name}.yaml"
    load_config(path).check(**facts)
    lines = path.read_text().splitlines()
    keys = [line for line in lines if line.strip() and not line.startswith("#")]
    for section, fields in PluginConfig().model_dump().items():
        for key in [section, *(fields if isinstance(fields, dict) else [])]:
            assert any(line.strip().startswith(f"{key}:") for line in keys), f"{name}: {key} is not shown"


def test_an_empty_section_is_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "plugin.yaml"
    path.write_text("parallel:\n#  expert: 4\nexpert:\n")
    assert load_config(path).model_dump() == PluginConfig().model_dump()


@pytest.mark.parametrize("config", [5, ["a"], 1.5])
def test_what_is_no_configuration_is_refused(config: object) -> None:
    with pytest.raises(ConfigError, match="must be a path, a mapping, a PluginConfig or None"):
        load_config(config)  # type: ignore[arg-type]


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("my.yaml", "parallel.expert", 3, "must divide 8")))
    assert str(error) == "my.yaml: parallel.expert = 3: must divide 8"


@pytest.mark.parametrize(
    "error",
    [ConfigError("my.yaml", "parallel.expert", 3, "must divide 8"), CommunicationTimeout(1, 0, "pp_send", "a", "b")],
)
def test_errors_survive_megatrons_building_of_modules(error: Exception) -> None:
    """Which raises them as here, to say what it was building."""
    text = f"{error} when instantiating MoELayer"
    again = type(error)(text)  # type: ignore[call-arg]
    assert str(again) == str(pickle.loads(pickle.dumps(again))) == text


class _Required(Section):
    size: int
    kind: str = "a"


class _Whole(Section):
    shape: _Required
    big: PluginConfig = PluginConfig()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"shape": {"kind": "b"}, "big": {}}, "f.yaml: shape.size = (not given): must be given"),
        ({"big": {}}, "f.yaml: shape = (not given): must be given"),
        ({"shape": {"sise": 3}}, "f.yaml: shape.sise = 3: unknown key, did you mean 'size'? allowed: size, kind"),
        ({"shap": {"size": 3}}, "f.yaml: shap = {'size': 3}: unknown key, did you mean 'shape'? allowed: shape, big"),
        ({"shape": {"other": 3}}, "f.yaml: shape.size = (not given): must be given"),
    ],
)
def test_keys_that_must_be_given(data: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(_Whole, data, "f.yaml")
    assert str(caught.value) == message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message
