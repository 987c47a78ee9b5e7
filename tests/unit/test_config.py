"""The settings tree: where values come from, and what is said about wrong ones."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml
from ray._private.label_utils import validate_label_selector

from ray_moe.config import Config
from ray_moe.config_sources import load_config, show_config
from ray_moe.config_types import Section
from ray_moe.errors import InvalidConfig


def refusal(tmp_path: Path, text: str | None = None, env: dict[str, str] | None = None, *flags: str) -> str:
    """What is said about these settings."""
    file = None
    if text is not None:
        file = tmp_path / "c.yaml"
        file.write_text(text)
    settings = [(flag.split("=")[0], flag.split("=")[1], "--set") for flag in flags]
    with pytest.raises(InvalidConfig) as caught:
        load_config(file, env, settings)
    return str(caught.value).replace(f"{tmp_path}/", "")


# --- Precedence ----------------------------------------------------------------------------------------------
def test_flags_beat_environment_beats_file_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("server: {port: 1, grace_s: 1, host: localhost}\nmodel: m\n")
    env = {"RAY_MOE__SERVER__PORT": "2", "RAY_MOE__SERVER__GRACE_S": "2", "RAY_MOE_TOKEN": "passed over", "HOME": "/"}
    loaded = load_config(file, env, [("server.port", 3, "--port")])
    server = loaded.config.server
    assert (server.port, server.grace_s, server.host, server.max_forward_tokens) == (3, 2.0, "localhost", 131_072)
    assert loaded.config.model == "m"
    assert loaded.sources == {
        ("server", "port"): "flag --port",
        ("server", "grace_s"): "environment variable RAY_MOE__SERVER__GRACE_S",
        ("server", "host"): str(file),
        ("model",): str(file),
    }


def test_what_is_here_is_named_so_that_actors_elsewhere_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model", "texts", "stdlib"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.txt").touch()
    monkeypatch.chdir(tmp_path)
    tree = {"model": "model", "train": {"data": ["texts", "*.txt", "stdlib", "of.mine:batches", "not/here"]}}
    config = Config.model_validate(tree)
    assert config.model == str(tmp_path / "model")
    assert config.train.data == (f"{tmp_path}/texts", f"{tmp_path}/*.txt", "stdlib", "of.mine:batches", "not/here")
    assert Config(model="allenai/OLMoE").model == "allenai/OLMoE"
    assert Config.model_validate({"train": {"data": "texts"}}).train.data == f"{tmp_path}/texts"


def test_later_flags_win() -> None:
    loaded = load_config(flags=[("server.port", "1", "--set"), ("server.port", 2, "--port")])
    assert loaded.config.server.port == 2
    assert loaded.sources[("server", "port")] == "flag --port"


def test_an_empty_file_and_an_empty_section_leave_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\nserver:\n")
    assert load_config(tmp_path / "c.yaml").config == Config()
    (tmp_path / "c.yaml").write_text("")
    assert load_config(tmp_path / "c.yaml").config == Config()


@pytest.mark.parametrize("text", ["null", "None", ""])
def test_text_can_unset_an_optional_setting(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text("experts: {experts_per_actor: 2}")
    flags = [("experts.experts_per_actor", text, "--set"), ("experts.num_actors", 4, "--actors")]
    experts = load_config(tmp_path / "c.yaml", flags=flags).config.experts
    assert (experts.num_actors, experts.experts_per_actor) == (4, None)


def test_mappings_come_whole_or_entry_by_entry() -> None:
    env = {"RAY_MOE__EXPERTS__RESOURCES": "{slot: 1, other: 0.5}"}
    flags = [("experts.resources.slot", "2", "--set"), ("experts.label_selector.ray.io/zone", "a", "--set")]
    experts = load_config(environ=env, flags=flags).config.experts
    assert experts.resources == {"slot": 2.0, "other": 0.5}
    assert experts.label_selector == {"ray.io/zone": "a"}


@pytest.mark.parametrize("key", ["a", "market-type", "ray.io/zone", "a.b_c-d.E/F", "9"])
@pytest.mark.parametrize("wanted", ["", "spot", "!spot", "in(a)", "in(a,b-c, d_e)", "!in(a, b)", "x" * 63])
def test_labels_are_those_that_ray_takes(key: str, wanted: str) -> None:
    config = Config.model_validate({"experts": {"label_selector": {key: wanted}}})
    assert config.experts.label_selector == {key: wanted}
    assert validate_label_selector({key: wanted}) is None


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1048576", 2**20), ("64MiB", 2**26), ("1.5 GiB", 3 * 2**29), ("300MB", 300_000_000), ("2097152b", 2**21)],
)
def test_sizes_have_units(text: str, num_bytes: int) -> None:
    assert load_config(flags=[("transport.arena_bytes", text, "--set")]).config.transport.arena_bytes == num_bytes


def test_the_tree_is_frozen_and_travels() -> None:
    config = load_config(flags=[("server.port", 0, "--port")]).config
    with pytest.raises(ValueError, match="frozen"):
        config.server.port = 2
    assert pickle.loads(pickle.dumps(config)) == config


# --- Show ----------------------------------------------------------------------------------------------------
def test_what_is_shown_can_be_loaded_again(tmp_path: Path) -> None:
    flags = [
        ("model", "a: b # c", "MODEL"),
        ("experts.resources.x", "1", "--set"),
        ("experts.label_selector", "{tier: '1', b: c}", "--set"),
        ("transport.arena_bytes", "3MiB", "--set"),
        ("transport.chunk_bytes", "5001", "--set"),
        ("ray.object_store_bytes", "1GiB", "--set"),
    ]
    loaded = load_config(environ={"RAY_MOE__SERVER__PORT": "1"}, flags=flags)
    text = show_config(loaded)
    assert "arena_bytes: 3MiB  # flag --set\n" in text
    assert "  port: 1  # environment variable RAY_MOE__SERVER__PORT\n" in text
    assert text.count("#") == len(loaded.sources) + 1
    (tmp_path / "c.yaml").write_text(text)
    assert load_config(tmp_path / "c.yaml").config == loaded.config


def test_every_setting_is_shown_and_described() -> None:
    def walk(section: type[Section], shown: object) -> None:
        assert isinstance(shown, dict)
        assert list(shown) == list(section.model_fields)
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                walk(field.annotation, shown[name])
            else:
                assert field.description, f"{section.__name__}.{name} has no description"

    walk(Config, yaml.safe_load(show_config(load_config())))


# --- Refusals ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "key", "neighbour"),
    [
        ("server: {prot: 1}", "server.prot", "server.port"),
        ("sever: {port: 1}", "sever", "server"),
        ("port: 1", "port", "server.port"),
        ("num_threads: 1", "num_threads", "experts.num_threads"),
        ("router: {grace_s: 1}", "router.grace_s", "server.grace_s"),
        ("experts: {standby: 1}", "experts.standby", "experts.standby_actors"),
        ("transport: {shm: true, arena_byte: 1}", "transport.shm", None),
        ("1: 2", "1", None),
    ],
)
def test_an_unknown_key_names_itself_and_its_neighbour(
    tmp_path: Path, text: str, key: str, neighbour: str | None
) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(f"c.yaml: there is no setting '{key}'; ")
    assert (f"did you mean '{neighbour}'?" if neighbour else "`ray-moe config --show` lists") in message


def test_unknown_keys_from_elsewhere_name_their_source(tmp_path: Path) -> None:
    assert refusal(tmp_path, None, {"RAY_MOE__SERVER__PROT": "1"}) == (
        "environment variable RAY_MOE__SERVER__PROT: there is no setting 'server.prot'; did you mean 'server.port'?"
    )
    assert "flag --set: there is no setting 'server.port.x'" in refusal(tmp_path, None, {}, "server.port.x=1")
    assert "'server' is a section with the settings host, port" in refusal(tmp_path, None, {}, "server=1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server: 8476", "'server' is a section with the settings host, port"),
        ("server: {port: abc}", "server.port = 'abc' (c.yaml): should be a valid integer"),
        ("server: {port: true}", "server.port = True (c.yaml): should be a number"),
        ("server: {port: 65536}", "server.port = 65536 (c.yaml): should be less than or equal to 65535"),
        ("transport: {kind: tcp}", "transport.kind = 'tcp' (c.yaml): should be 'auto', 'grpc' or 'object_store'"),
        ("transport: {arena_bytes: 5 parsecs}", "should be a number of bytes, or a size such as 64KiB"),
        ("transport: {ping_timeout_s: .nan}", "should be a finite number"),
        ("transport: {ping_timeout_s: 0}", "should be greater than 0"),
        ("experts: {num_cpus: 1.5}", "should be a whole number, or at most 1"),
        ("experts: {num_gpus: -1}", "should be greater than or equal to 0"),
        ("experts: {resources: {slot: x}}", "experts.resources.slot = 'x' (c.yaml): should be a valid number"),
        ("experts: {resources: {slot: 0}}", "experts.resources.slot = 0 (c.yaml): should be greater than 0"),
        ("experts: {resources: {slot: 1.5}}", "experts.resources.slot = 1.5 (c.yaml): should be a whole number, or at"),
        ("experts: {resources: {CPU: 1}}", "should name custom resources, not 'CPU': set experts.num_cpus"),
        ("experts: {resources: {GPU: 1}}", "should name custom resources, not 'GPU': set experts.num_gpus"),
        ("experts: {resources: {memory: 9}}", "should name custom resources, not 'memory'"),
        ("experts: {resources: {object_store_memory: 9}}", "should name custom resources, not 'object_store_memory'"),
        ("experts: {resources: {'': 1}}", "should name custom resources, not '': it is empty"),
        ("experts: {label_selector: {bad key!: a}}", "should have labels as keys, not 'bad key!': up to 63 letters"),
        ("experts: {label_selector: {-a: b}}", "should have labels as keys, not '-a'"),
        ("experts: {label_selector: {a..b/c: d}}", "should have labels as keys, not 'a..b/c'"),
        ("experts: {label_selector: {a: in(}}", "has 'in(' for a; should be a label's value, !value, in(a,b) or"),
        ("experts: {label_selector: {a: '!!b'}}", "has '!!b' for a; should be"),
        ("experts: {label_selector: {a: in()}}", "has 'in()' for a; should be"),
        ("experts: {resources: 1}", "experts.resources = 1 (c.yaml): should be a valid dictionary"),
        ("experts: {offload: cpu}", "experts: offload: cpu is for actors on GPUs; set num_gpus, or offload: disk"),
        ("experts: {offload: disk, max_bytes: 1}", "memory has resident_bytes of experts, so leave max_bytes out"),
        ("experts: {offload: tape}", "experts.offload = 'tape' (c.yaml): should be 'none', 'cpu' or 'disk'"),
        ("experts: {quantization: fp4}", "should be 'none', 'int8', 'int8_compute' or 'fp8'"),
        ("train: {optimizer: {offload: tape}}", "should be 'none', 'cpu' or 'disk'"),
        ("ray: {address: somewhere}", "should be 'local', 'auto' or the HOST:PORT of a running cluster"),
        ("router: {device: tpu}", "should be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ("model: 3", "model = 3 (c.yaml): should be a valid string. It is: Directory of a Hugging Face checkpoint"),
        ("[1]", "c.yaml should hold settings such as 'server: {port: 8476}', not a list"),
        ("a: [", "c.yaml is not YAML: while parsing"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(tmp_path: Path, text: str, said: str) -> None:
    message = refusal(tmp_path, text)
    assert said in message
    assert "pydantic" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "means"), [("true", "cpu"), ("false", "none"), ("cpu", "cpu"), ("disk", "disk"), ("none", "none")]
)
def test_offloading_the_optimizer_was_a_truth_value_once(tmp_path: Path, text: str, means: str) -> None:
    (tmp_path / "c.yaml").write_text(f"train: {{optimizer: {{offload: {text}}}}}")
    assert load_config(tmp_path / "c.yaml").config.train.optimizer.offload == means
    assert load_config(flags=[("train.optimizer.offload", text, "--set")]).config.train.optimizer.offload == means


def test_every_wrong_value_is_told_at_once(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, "server: {port: -1, grace_s: -1}").splitlines()) == 2


def test_a_contradiction_names_both_sources(tmp_path: Path) -> None:
    message = refusal(tmp_path, "experts: {num_actors: 2}", {"RAY_MOE__EXPERTS__EXPERTS_PER_ACTOR": "2"})
    assert "num_actors and experts_per_actor are both set" in message
    assert "c.yaml, environment variable RAY_MOE__EXPERTS__EXPERTS_PER_ACTOR" in message.replace(f"{tmp_path}/", "")


def test_adapters_are_of_whole_experts(tmp_path: Path) -> None:
    for cut, parallel in (("experts: {tensor: 2}, ", ""), ("", "parallel: {tensor: 2}, ")):
        message = refusal(tmp_path, f"{{{cut}train: {{{parallel}lora: {{experts: true}}}}}}")
        assert "experts are in 2 parts, each of which would learn an adapter of its own" in message
    file = tmp_path / "c.yaml"
    file.write_text("{experts: {tensor: 2}, train: {parallel: {tensor: 1}, lora: {experts: true}}}")
    assert load_config(file).config.train.lora is not None


def test_a_gate_is_a_name_with_its_own_options_or_without(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train: {gate: noisy_topk, auxiliary: {load: 0.1}}")
    assert load_config(file).config.train.gate == {"name": "noisy_topk"}
    flags = [("train.gate.name", "sigmoid", "--set"), ("train.gate.num_groups", "4", "--set")]
    loaded = load_config(flags=[*flags, ("train.gate.normalize", "false", "--set")])
    assert loaded.config.train.gate == {"name": "sigmoid", "num_groups": 4, "normalize": False}
    file.write_text(show_config(loaded))
    assert load_config(file).config == loaded.config
    assert load_config(flags=[("train.gate", "", "--set")]).config.train.gate == {}
    own = [("train.gate.name", "ray_moe.ops.gates.topk:TopKSettings", "--set"), ("train.gate.top_k", "1", "--set")]
    assert load_config(flags=own).config.train.gate == {"name": "ray_moe.ops.gates.topk:TopKSettings", "top_k": 1}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("{gate: best}", "should have one of these as its name: topk, switch, noisy_topk"),
        ("{gate: {top_k: 2}}", "should have one of these as its name"),
        ("{gate: 'nowhere_at_all:Gate'}", "cannot import the gate 'nowhere_at_all:Gate': No module named"),
        ("{gate: 'pathlib:Path'}", "the gate 'pathlib:Path' is no dataclass with build"),
        ("{gate: {name: 'ray_moe.ops.gates.topk:TopKSettings', k: 1}}", "has an option 'k', which the gate"),
        ("{gate: {name: sigmoid, groups: 2}}", "has an option 'groups', which the gate sigmoid has not; it has top_k,"),
        ("{gate: {name: sigmoid, num_groups: many}}", "cannot have: num_groups: Input should be a valid integer"),
        ("{gate: {name: sigmoid, num_groups: 2, top_groups: 3}}", "cannot have: top_groups is in 1..num_groups"),
        ("{auxiliary: {entropy: 0.1}}", "auxiliary.entropy is a loss of some gates, and gate names none"),
        ("{methods: {expert_dropout: 1}}", "less than 1"),
        ("{methods: {capacity: {policy: none}}}", "'drop', 'next' or 'random'"),
    ],
)
def test_a_gate_or_method_that_cannot_be_is_refused(tmp_path: Path, train: str, message: str) -> None:
    assert message in refusal(tmp_path, f"train: {train}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"cannot read the configuration .*none.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InvalidConfig, match="Is a directory"):
        load_config(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidConfig, match="not UTF-8 text"):
        load_config(tmp_path / "c.yaml")
    assert "flag --set is not YAML" in refusal(tmp_path, None, {}, "experts.resources=[")


def test_the_replicas_wanted_are_what_both_settings_ask_for() -> None:
    assert Config.model_validate({"balance": {"min_replicas": 3, "survive_nodes": 1}}).balance.replicas_wanted == 3
    assert Config.model_validate({"balance": {"survive_nodes": 1}}).balance.replicas_wanted == 2
