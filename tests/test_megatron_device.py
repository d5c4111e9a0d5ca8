"""What the Megatron dispatcher does for a GPU, seen on the host: a buffer that says it is one notes its calls."""

from __future__ import annotations

import logging
import sys
import types
from typing import Any

import pytest
import torch

import epv2_plugin
from epv2_plugin.config import ConfigError, PluginConfig
from epv2_plugin.elastic import ElasticBuffer, EventOverlap
from epv2_plugin.elastic.model import scale_up_rate
from epv2_plugin.plugin import WITHOUT_EFFECT, _unused
from tests import harness
from tests.test_megatron import EXPERTS, HIDDEN, _layer, _parallel

CALLS: list[tuple[Any, ...]] = []
MADE: list[dict[str, Any]] = []
RATES: list[float] = []
GPU: list[str] = ["NVIDIA H200"]


class Event:
    """Notes when it is waited for."""

    def __init__(self, name: str, event: EventOverlap):
        self._name, self._event = name, event

    def current_stream_wait(self, release_handle: bool = False) -> None:
        CALLS.append((self._name, "waited for"))
        self._event.current_stream_wait(release_handle)


class Buffer(ElasticBuffer):
    """The host's buffer, with the appearance of a GPU's."""

    def __init__(self, group: Any, **options: Any):
        MADE.append(dict(options))
        super().__init__(group, **{**options, "backend": "host"})

    def describe(self) -> dict[str, Any]:
        return {"backend": "cuda", "mode": "direct", "transport": "nccl lsa", "sms": 24, "qps": 0}

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int, *args: Any, nvlink_gbs: float = 0) -> int:
        RATES.append(nvlink_gbs)
        scale_up_rate(GPU[0], nvlink_gbs or "auto")
        return 12

    def _note(self, name: str, options: dict[str, Any]) -> None:
        CALLS.append((name, options.get("num_sms"), options.get("async_with_compute_stream", False)))
        if options.get("async_with_compute_stream"):
            assert options["previous_event"] is not None

    def dispatch(self, *args: Any, **options: Any) -> Any:
        self._note("dispatch", options)
        *results, event = super().dispatch(*args, **options)
        return *results, Event("dispatch", event)

    def combine(self, *args: Any, **options: Any) -> Any:
        self._note("combine", options)
        *results, event = super().combine(*args, **options)
        return *results, Event("combine", event)


def _as_on_a_gpu(config: dict[str, Any], expert: int) -> None:
    from epv2_plugin.megatron import dispatcher

    epv2_plugin.enable(config)
    dispatcher.ElasticBuffer = Buffer  # type: ignore[misc]
    dispatcher.resolve_backend = lambda name: "cuda"  # type: ignore[assignment]
    _parallel(1, expert)


def _step(layer: Any, tokens: int) -> torch.Tensor:
    x = torch.randn(tokens, 1, HIDDEN, requires_grad=True)
    output, _ = layer(x)
    output.sum().backward()
    return x.grad


def first_batch(rank: int, size: int) -> Any:
    _as_on_a_gpu({}, 2)
    layer, wider = _layer("epv2", 1, 2, 1), _layer("epv2", 1, 2, 1, moe_router_topk=5)
    before = layer.token_dispatcher.buffer, epv2_plugin.status()["groups"]
    _step(layer, [4, 7][rank])
    groups = epv2_plugin.status()["groups"]
    _step(layer, 7)  # up to the first batch's largest
    _step(wider, 3)
    with pytest.raises(epv2_plugin.ConfigError) as error:
        layer(torch.randn(8, 1, HIDDEN))
    layers = [_layer("epv2", 1, 2, 1).token_dispatcher.buffer for _ in range(2)]
    assert layers == [layer.token_dispatcher.buffer] * 2
    return before, groups, MADE, str(error.value)


def test_the_first_micro_batch_says_how_large_the_buffer_must_be() -> None:
    for before, groups, made, error in harness.run(2, first_batch):
        assert before == (None, [])
        assert len(groups) == 1
        assert groups[0]["ranks"] == [0, 1]
        what = {name: groups[0][name] for name in ("backend", "mode", "transport", "sms", "qps")}
        assert what == {"backend": "cuda", "mode": "direct", "transport": "nccl lsa", "sms": 12, "qps": 0}
        assert groups[0]["undeduplicated_bytes"] > 0
        assert [(m["num_max_tokens_per_rank"], m["hidden"], m["num_topk"]) for m in made] == [
            (7, HIDDEN, 3),
            (3, HIDDEN, 5),  # another model has a buffer of its own
        ]
        assert not made[0]["use_fp8_dispatch"]
        assert error.startswith("<dict>: expert.max_tokens_per_rank = 'auto': a micro-batch has 8 tokens")


def known_sizes(rank: int, size: int) -> list[int]:
    from epv2_plugin.megatron import dispatcher

    found = []
    for config, args in (
        ({"expert": {"max_tokens_per_rank": 50}}, None),
        ({}, types.SimpleNamespace(seq_length=30, micro_batch_size=2)),
        ({}, types.SimpleNamespace(seq_length=30, micro_batch_size=2, decoder_seq_length=40)),
        ({}, types.SimpleNamespace(seq_length=None, micro_batch_size=2)),
    ):
        _as_on_a_gpu(config, 2)
        sys.modules["megatron.training.global_vars"] = types.SimpleNamespace(_GLOBAL_ARGS=args)  # type: ignore[assignment]
        buffer = _layer("epv2", 1, 2, 1).token_dispatcher.buffer
        found.append(buffer and buffer.num_max_tokens_per_rank)
        dispatcher.uninstall()
        epv2_plugin.disable()
    _as_on_a_gpu({}, 2)
    _parallel(2, 2)  # with tensor parallelism each rank has a part of the sequence
    sys.modules["megatron.training.global_vars"]._GLOBAL_ARGS = types.SimpleNamespace(seq_length=30, micro_batch_size=2)
    return [*found, _layer("epv2", 2, 2, 1).token_dispatcher.buffer.num_max_tokens_per_rank]


def test_what_says_the_size_ahead() -> None:
    for found in harness.run(4, known_sizes):
        assert found == [50, 60, 80, None, 30]


def budget_and_overlap(rank: int, size: int, config: dict[str, Any], overlap: bool) -> list[tuple[Any, ...]]:
    _as_on_a_gpu(config, 2)
    fields = {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_overlap": True} if overlap else {}
    layer = _layer("epv2", 1, 2, 1, **fields)
    if overlap:
        for name in ("pre_forward_comm", "linear_fc1_forward_and_act", "linear_fc2_forward", "get_output"):
            _note_calls(layer.shared_experts, name)
    _step(layer, 5)
    return CALLS


def _note_calls(owner: Any, name: str) -> None:
    method = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        CALLS.append(("shared", name))
        return method(*args, **options)

    setattr(owner, name, call)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("layout", ["expanded", "compact"])
def test_shared_experts_run_while_tokens_travel(dtype: str, layout: str) -> None:
    config = {"sm_budget": {"expert": 6}, "expert": {"dispatch_dtype": dtype, "layout": layout}}
    for calls in harness.run(2, budget_and_overlap, config, True):
        assert calls == [
            ("shared", "pre_forward_comm"),
            ("dispatch", 6, True),
            ("shared", "linear_fc1_forward_and_act"),
            ("dispatch", "waited for"),
            ("combine", 6, True),
            ("shared", "linear_fc2_forward"),
            ("combine", "waited for"),
            ("shared", "get_output"),
            ("dispatch", 6, False),  # the backward pass: on the streams of the forward pass, which overlap as well
            ("combine", 6, False),
        ]


def test_the_analytic_budget_holds_without_one_in_the_configuration() -> None:
    for calls in harness.run(2, budget_and_overlap, {}, False):
        assert [call for call in calls if call[1] != "waited for"] == [
            ("dispatch", 12, False),
            ("combine", 12, False),
            ("dispatch", 12, False),
            ("combine", 12, False),
        ]


def rates(rank: int, size: int) -> tuple[list[float], str, int]:
    """What the model was told of the links, what is said where it needs to be told, and the SMs where it does not."""
    from epv2_plugin.megatron import dispatcher

    for network in ({}, {"scale_up_gbytes_per_s": 200.0}):
        _as_on_a_gpu({"network": network, "expert": {"max_tokens_per_rank": 8}}, 2)
        _layer("epv2", 1, 2, 1)
        epv2_plugin.disable()
    GPU[0] = "NVIDIA H100 PCIe"
    _as_on_a_gpu({"expert": {"max_tokens_per_rank": 8}}, 2)
    with pytest.raises(epv2_plugin.ConfigError) as error:
        _layer("epv2", 1, 2, 1)
    epv2_plugin.disable()
    _as_on_a_gpu({"expert": {"max_tokens_per_rank": 8}, "sm_budget": {"expert": 6}}, 2)
    _layer("epv2", 1, 2, 1)
    return RATES, str(error.value), dispatcher.groups()[0]["sms"]


def test_the_configured_rate_of_links_reaches_the_model() -> None:
    for told, error, sms in harness.run(2, rates):
        assert told == [0, 200.0, 0]  # nobody asks where a budget is configured
        assert error == (
            "<dict>: network.scale_up_gbytes_per_s = 'auto': the bandwidth between GPUs of type 'NVIDIA H100 PCIe' is "
            "not known here; set network.scale_up_gbytes_per_s to the GB/s that one GPU reaches in one direction"
        )
        assert sms == 6


def on_cuda(rank: int, size: int, config: dict[str, Any]) -> tuple[dict[str, Any], bool, list[str]]:
    """Status, whether Megatron's own pipeline communicator is in place, and the lines of the log."""
    from epv2_plugin import plugin
    from epv2_plugin.megatron import cpu_bridge

    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    cpu_bridge.install()
    from megatron.core.pipeline_parallel import p2p_communication, schedules

    plugin.logger.addHandler(Lines())
    plugin.logger.setLevel(logging.INFO)
    plugin.check = lambda config: "cuda"  # type: ignore[assignment]
    epv2_plugin.enable(config)
    return epv2_plugin.status(), schedules.P2PCommunicator is p2p_communication.P2PCommunicator, lines


@pytest.mark.parametrize(
    ("config", "pipeline", "context"),
    [
        ({}, "epv2", "epv2"),
        ({"pipeline": {"transport": "copy_engine"}}, "epv2", "epv2"),
        ({"pipeline": {"transport": "stock"}}, "stock", "epv2"),
        ({"context": {"kv_exchange": "stock"}}, "epv2", "stock"),
    ],
)
def test_pipeline_and_context_on_the_cuda_backend(config: dict[str, Any], pipeline: str, context: str) -> None:
    ((status, own, lines),) = harness.run(1, on_cuda, config)
    assert (status["backend"], status["pipeline"], status["context"]) == ("cuda", pipeline, context)
    assert status["unused"] == []
    assert own == (pipeline == "stock")
    assert any("core_attention" in name for name in status["replaced"]) == (context == "epv2")
    assert any(f"pipeline: {pipeline}, context: {context}" in line for line in lines)


def alignment(rank: int, size: int, layout: str) -> list[tuple[list[int], list[int], bool]]:
    """Rows of each expert with padding for quantized GEMMs, and where they are counted."""
    _as_on_a_gpu({"expert": {"layout": layout}}, 2)
    dispatcher = _layer("epv2", 1, 2, 1).token_dispatcher
    # Set afterwards, because Megatron wants Transformer Engine for it.
    dispatcher.config.moe_router_padding_for_quantization, dispatcher.config.fp8 = True, "e4m3"
    x = torch.ones(5, 1, HIDDEN)
    routing_map = torch.zeros(5, EXPERTS, dtype=torch.bool)
    routing_map[:, [0, 3, 7]] = True
    hidden, weights = dispatcher.dispatch_preprocess(x, routing_map, routing_map.float())
    hidden, counts, weights = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(hidden, weights))
    real = [int(part.any(1).sum()) for part in hidden.split(counts.tolist())]
    out = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(hidden)))
    assert torch.equal(out, 3 * x)
    return [(counts.tolist(), real, counts.device.type == "cpu")]


@pytest.mark.parametrize("layout", ["expanded", "compact"])
def test_rows_are_padded_for_quantized_experts(layout: str) -> None:
    for rank, found in enumerate(harness.run(2, alignment, layout)):
        real = [[10, 0, 0, 10], [0, 0, 0, 10]][rank]
        assert found == [([-(-count // 16) * 16 for count in real], real, True)]


def test_keys_without_effect_depend_on_the_backend() -> None:
    config = epv2_plugin.load_config(
        {
            "sm_budget": {"expert": 8, "pipeline": 2},
            "network": {"qps": 4, "rdma_gbytes_per_s": 50.0},
            "pipeline": {"transport": "stock"},
            "expert": {"layout": "compact"},
            "timeouts": {"gpu_seconds": 5, "host_seconds": 6},
        }
    )
    on_host = [
        "sm_budget.expert",
        "sm_budget.pipeline",
        "network.rdma_gbytes_per_s",
        "network.qps",
        "timeouts.gpu_seconds",
    ]
    assert sorted(_unused(config, "host")) == sorted(on_host)
    assert _unused(config, "cuda") == ["sm_budget.pipeline"]
    assert set(WITHOUT_EFFECT) == {"host", "cuda"}


@pytest.mark.parametrize("overlap", ["overlap_moe_expert_parallel_comm", "fine_grained_activation_offloading"])
def test_places_are_refused_beside_what_records_streams(monkeypatch: pytest.MonkeyPatch, overlap: str) -> None:
    from epv2_plugin.megatron import pipeline

    config = PluginConfig.model_validate({"pipeline": {"transport": "copy_engine", "max_inplace": 2}})
    monkeypatch.setattr(pipeline, "_config", config)
    of_megatron = types.SimpleNamespace(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=None, **{overlap: True}
    )
    with pytest.raises(ConfigError, match=rf"pipeline.max_inplace = 2: must be 0 with Megatron's {overlap}"):
        pipeline._buffer_for(None, of_megatron)  # type: ignore[arg-type]
