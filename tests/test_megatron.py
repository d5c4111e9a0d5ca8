"""The Megatron adapter: one MoE layer with the stock dispatcher against the same layer with ours."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import epv2_plugin
from tests import harness

HIDDEN, EXPERTS = 16, 8


def _parallel(tensor: int, expert: int, expert_tensor: int = 1) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    model_parallel_cuda_manual_seed(7)


def _layer(dispatcher: str, tensor: int, expert: int, expert_tensor: int, **fields: Any) -> Any:
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    ours = dispatcher == "epv2"
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        use_cpu_initialization=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=24,
        moe_token_dispatcher_type="flex" if ours else dispatcher,
        moe_flex_dispatcher_backend="epv2" if ours else "deepep",
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        **{
            "moe_router_topk": 3,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "bias_activation_fusion": False,
            **fields,
        },
    )
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    if isinstance(spec, type) or not hasattr(spec, "submodules"):
        layer = spec(config=config)  # 0.19: a partial
    else:
        layer = MoELayer(config=config, submodules=spec.submodules)
    layer.set_layer_number(1)
    layer.train()
    return layer.to(torch.bfloat16) if fields.get("bf16") else layer


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sigmoid, bias, groups": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
    },
    "shared expert": {"moe_shared_expert_intermediate_size": 24},
    "shared expert, overlapped": {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_overlap": True},
    "capacity": {"moe_expert_capacity_factor": 0.8},
    "capacity, padded": {"moe_expert_capacity_factor": 0.8, "moe_pad_expert_input_to_capacity": True},
    "recompute the layer": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "top-1": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "top-E": {"moe_router_topk": EXPERTS},
    "bf16": {"bf16": True, "params_dtype": torch.bfloat16},
}
LAYOUTS = {
    "ep4": (1, 4, 1),
    "ep2 x dp2": (1, 2, 1),
    "tp2 x ep4": (2, 4, 1),
    "tp2 x ep2 x etp2": (2, 2, 2),
    "dp4": (1, 1, 1),
}


def compare_layers(rank: int, size: int, layout: str, config: dict[str, Any]) -> dict[str, list[float]]:
    """Largest difference of output, input gradient and weight gradients, for every case."""
    epv2_plugin.enable(config)
    tensor, expert, expert_tensor = LAYOUTS[layout]
    _parallel(tensor, expert, expert_tensor)
    found = {}
    for name, fields in CASES.items():
        dtype = torch.bfloat16 if fields.get("bf16") else torch.float32
        results = []
        # gloo has no all-gather of unequal parts, which the stock all-to-all needs for tensor-parallel experts.
        for dispatcher in ("allgather" if expert_tensor > 1 else "alltoall", "epv2"):
            lacks = (
                ("moe_shared_expert_overlap", "moe_pad_expert_input_to_capacity") if dispatcher == "allgather" else ()
            )
            supported = {key: value for key, value in fields.items() if key not in lacks}
            layer = _layer(dispatcher, tensor, expert, expert_tensor, **supported)
            gen = torch.Generator().manual_seed(11)
            for parameter in layer.parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=gen) * 0.2)
            if layer.router.expert_bias is not None:
                layer.router.expert_bias.copy_(torch.randn(EXPERTS, generator=gen))
            gen = torch.Generator().manual_seed(rank)
            x = torch.randn(6, 3, HIDDEN, generator=gen).to(dtype).requires_grad_()
            output, _ = layer(x)
            output.backward(torch.randn(output.shape, generator=gen).to(dtype))
            results.append([output.detach(), x.grad, *(p.grad for p in layer.parameters())])
        stock, ours = results
        assert [t is None for t in stock] == [t is None for t in ours], name
        pairs = [(a, b) for a, b in zip(stock, ours, strict=True) if a is not None]
        found[name] = [float((a - b).abs().max() / (a.abs().max() + 1e-9)) for a, b in pairs]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_equals_stock(layout: str) -> None:
    for found in harness.run(4, compare_layers, layout, {}):
        for name, differences in found.items():
            assert max(differences) < (2e-2 if name == "bf16" else 1e-5), (name, differences)


def test_compact_layout_equals_stock() -> None:
    for found in harness.run(4, compare_layers, "ep4", {"expert": {"layout": "compact"}}):
        for name, differences in found.items():
            assert max(differences) < (2e-2 if name == "bf16" else 1e-5), (name, differences)


def test_fp8_dispatch_is_close() -> None:
    for found in harness.run(4, compare_layers, "ep4", {"expert": {"dispatch_dtype": "fp8"}}):
        for name, differences in found.items():
            assert 1e-4 < differences[0] < 0.1, (name, differences[0])


def uneven_tokens(rank: int, size: int) -> None:
    """Different and zero token counts through the dispatcher (Megatron's router refuses zero tokens)."""
    epv2_plugin.enable()
    _parallel(1, 4)
    dispatcher = _layer("epv2", 1, 4, 1).token_dispatcher
    x = torch.randn([5, 0, 2, 9][rank], 1, HIDDEN, requires_grad=True)
    probs = torch.rand(x.shape[0], EXPERTS).requires_grad_()
    routing_map = torch.zeros(x.shape[0], EXPERTS, dtype=torch.bool)
    routing_map[:, [0, 3, 4]] = True  # ranks 0, 1 and 2; none on rank 3
    hidden, weights = dispatcher.dispatch_preprocess(x, routing_map, probs)
    hidden, weights = dispatcher.token_dispatch(hidden, weights)
    hidden, counts, weights = dispatcher.dispatch_postprocess(hidden, weights)
    assert counts.tolist() == [[16, 0], [0, 16], [16, 0], [0, 0]][rank]
    hidden = dispatcher.combine_preprocess(hidden * weights.unsqueeze(1))
    output = dispatcher.combine_postprocess(dispatcher.token_combine(hidden))
    share = probs.detach()[:, [0, 3, 4]].sum(1).view(-1, 1, 1)
    torch.testing.assert_close(output, x.detach() * share)
    output.sum().backward()
    torch.testing.assert_close(x.grad, share.expand_as(x))
    torch.testing.assert_close(probs.grad, routing_map * x.detach().sum(2), rtol=1e-4, atol=1e-5)


def test_uneven_tokens() -> None:
    harness.run(4, uneven_tokens)


def enable_and_disable(rank: int, size: int) -> dict[str, Any]:
    """Every replaced symbol before, during and after."""
    import importlib

    def value(dotted: str) -> Any:
        if dotted.endswith("]"):
            return None
        parts = dotted.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            try:
                owner: Any = importlib.import_module(".".join(parts[:cut]))
            except ImportError:
                continue
            for part in parts[cut:-1]:
                owner = getattr(owner, part)
            return owner.__dict__.get(parts[-1], "absent")
        return None

    epv2_plugin.enable()
    status = epv2_plugin.status()
    names = [*status["replaced"], *status["bridge"]]
    epv2_plugin.disable()
    before = {name: value(name) for name in names}
    for _ in range(2):
        epv2_plugin.enable({})
        epv2_plugin.enable({})
        during = {name: value(name) for name in names}
        with pytest.raises(RuntimeError, match="disable"):
            epv2_plugin.enable({"expert": {"mode": "direct"}})
        epv2_plugin.disable()
        epv2_plugin.disable()
        after = {name: value(name) for name in names}
    changed = [name for name in names if during[name] is not before[name]]
    restored = all(after[name] is before[name] for name in names)
    return {"status": status, "after": epv2_plugin.status(), "changed": changed, "restored": restored}


def test_enable_is_reversible() -> None:
    (got,) = harness.run(1, enable_and_disable)
    assert got["restored"]
    assert got["status"]["enabled"]
    assert not got["after"]["enabled"]
    assert "megatron.core.transformer.moe.moe_layer.MoEFlexTokenDispatcher" in got["changed"]
    assert "megatron.core.transformer.moe.moe_layer.MoEFlexTokenDispatcher" in got["status"]["replaced"]
    assert any("torch" in name for name in got["status"]["bridge"])


def refusals(rank: int, size: int) -> dict[str, str]:
    messages = {}
    for key, config in {
        "cuda": {"backend": "cuda"},
        "hybrid": {"expert": {"mode": "hybrid"}},
        "sync": {"expert": {"host_sync": False}},
        "key": {"expertt": {}},
    }.items():
        with pytest.raises(epv2_plugin.ConfigError) as error:
            epv2_plugin.enable(config)
        messages[key] = str(error.value)
    epv2_plugin.enable({"parallel": {"expert": 4}})
    _parallel(1, 2)
    with pytest.raises(epv2_plugin.ConfigError) as error:
        _layer("epv2", 1, 2, 1)
    messages["degree"] = str(error.value)
    from megatron.core.transformer.transformer_config import TransformerConfig

    with pytest.raises(
        ValueError, match="moe_pad_expert_input_to_capacity"
    ):  # other backends keep Megatron's own limits
        TransformerConfig(
            num_layers=1,
            hidden_size=16,
            num_attention_heads=2,
            num_moe_experts=4,
            moe_expert_capacity_factor=1.0,
            moe_pad_expert_input_to_capacity=True,
            moe_token_dispatcher_type="flex",
            moe_flex_dispatcher_backend="deepep",
        )
    backend = {f.name: f.type for f in dataclasses.fields(TransformerConfig)}["moe_flex_dispatcher_backend"]
    messages["choices"] = str(backend)
    return messages


def test_refusals_name_key_and_value() -> None:
    for messages in harness.run(2, refusals):
        assert "backend = 'cuda'" in messages["cuda"]
        assert "expert.mode = 'hybrid'" in messages["hybrid"]
        assert "expert.host_sync = False" in messages["sync"]
        assert "'expert'" in messages["key"]
        assert "parallel.expert = 4: Megatron was started with 2" in messages["degree"]
        assert "epv2" in messages["choices"]
        assert "deepep" in messages["choices"]
