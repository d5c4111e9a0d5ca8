"""Recipes: what loads, what is refused and how, sizes of the published model, and the Megatron-LM arguments."""

import argparse
import math
import subprocess
from pathlib import Path

import pytest
import yaml

from epv2_plugin.cli import main
from epv2_plugin.config import ConfigError
from epv2_plugin.training.recipe import (
    Recipe,
    load_recipe,
    megatron_args,
    memory_per_rank,
    parameter_count,
    stages,
)

RECIPES = Path(__file__).parent.parent / "recipes"
TINY, SMALL, V3, PROXY, PROXY_2X2, TINY_3D, TINY_3D_GPU = (
    RECIPES / f"deepseek_v3_{name}.yaml"
    for name in ("tiny", "small", "671b", "proxy_1gpu", "proxy_2x2", "tiny_3d", "tiny_3d_1gpu")
)


def arguments(recipe: Recipe, **kwargs: str) -> dict[str, list[str]]:
    """Flags with their values."""
    result: dict[str, list[str]] = {}
    for word in megatron_args(recipe, **kwargs):
        if word.startswith("--"):
            assert word not in result, f"{word} twice"
            current = result[word] = []
        else:
            current.append(word)
    return result


@pytest.mark.parametrize("path", [TINY, SMALL, V3, PROXY, PROXY_2X2, TINY_3D, TINY_3D_GPU], ids=lambda path: path.stem)
def test_the_recipes_load(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.source == str(path)
    assert recipe.plugin.source == f"{path}: plugin"
    assert recipe.micro_batches * recipe.train.micro_batch_size * recipe.data_parallel == recipe.train.global_batch_size


@pytest.mark.parametrize("path", [TINY, SMALL], ids=lambda path: path.stem)
def test_the_cpu_recipes_are_for_four_ranks_without_a_gpu(path):
    recipe = load_recipe(path)
    assert (recipe.train.processes, recipe.degree("expert"), recipe.plugin.backend) == (4, 4, "host")
    assert recipe.data.path == "stdlib"
    assert recipe.train.precision == "fp32"


def test_the_recipe_of_three_dimensions_trains_the_tiny_model():
    plain, recipe = load_recipe(TINY), load_recipe(TINY_3D)
    assert recipe.model == plain.model
    degrees = [recipe.degree(name) for name in ("expert", "pipeline", "context", "tensor")]
    assert (recipe.train.processes, degrees, recipe.data_parallel, recipe.micro_batches) == (8, [2, 2, 2, 1], 2, 4)


def test_its_twin_for_a_gpu_trains_the_same():
    host, gpu = load_recipe(TINY_3D), load_recipe(TINY_3D_GPU)
    assert (gpu.model, gpu.data) == (host.model, host.data)
    assert gpu.train == host.train.model_copy(update={"precision": "bf16"})
    assert gpu.plugin.parallel == host.plugin.parallel
    assert (gpu.plugin.backend, gpu.plugin.expert.max_tokens_per_rank) == ("cuda", gpu.model.seq_length // 2)


def test_the_published_shape():
    recipe = load_recipe(V3)
    model, mla, moe = recipe.model, recipe.model.mla, recipe.model.moe
    assert (model.num_layers, model.first_dense_layers, model.hidden_size) == (61, 3, 7168)
    assert (model.num_attention_heads, model.ffn_hidden_size, model.vocab_size) == (128, 18432, 129280)
    assert (mla.q_lora_rank, mla.kv_lora_rank) == (1536, 512)
    assert (mla.qk_head_dim, mla.qk_pos_emb_head_dim, mla.v_head_dim) == (128, 64, 128)
    assert (moe.num_experts, moe.top_k, moe.num_groups, moe.group_top_k) == (256, 8, 8, 4)
    assert (moe.num_shared_experts, moe.ffn_hidden_size, moe.routed_scaling_factor) == (1, 2048, 2.5)
    assert model.mtp_layers == 1
    assert (recipe.train.processes, recipe.degree("expert"), recipe.degree("pipeline")) == (2048, 64, 16)


def test_the_proxy_is_a_layer_of_the_published_shape():
    proxy, published = load_recipe(PROXY), load_recipe(V3)
    same = ("hidden_size", "num_attention_heads", "init_std", "mla", "seq_length")
    assert all(getattr(proxy.model, name) == getattr(published.model, name) for name in same)
    fewer = {"num_experts": 16, "num_groups": 8, "aux_loss_coeff": 0.0}
    assert proxy.model.moe == published.model.moe.model_copy(update=fewer)
    train = proxy.train
    assert (train.processes, train.steps, train.precision, proxy.degree("expert")) == (4, 50, "bf16", 4)
    assert train.micro_batch_size * proxy.model.seq_length == proxy.plugin.expert.max_tokens_per_rank == 4096
    assert proxy.micro_batches == 1
    assert proxy.plugin.backend == "cuda"


def test_two_arms_of_the_proxy_leave_room_on_one_gpu():
    (rank,) = memory_per_rank(load_recipe(PROXY))
    assert 4 * rank.total / 2**30 == pytest.approx(19.7, abs=0.05)  # as its head says
    assert 70 - 2 * 4 * rank.total / 2**30 > 30


def test_the_published_parameter_count():
    count = parameter_count(load_recipe(V3))
    # The sum over the tensors of the published checkpoint, without its MTP module.
    assert count.total == 671_026_419_200
    assert round(count.active / 1e9) == 37
    assert count.embedding == 2 * 129280 * 7168
    assert count.experts == 58 * 256 * 3 * 7168 * 2048
    assert round(count.mtp / 1e9, 1) == 11.6


def test_counts_by_hand_on_a_tiny_model():
    recipe = load_recipe(TINY, {"model.mtp_layers": 1})
    attention = 128 * 64 + 64 + 64 * 4 * 48 + 128 * (32 + 16) + 32 + 32 * 4 * (32 + 32) + 4 * 32 * 128
    expert, router = 3 * 128 * 64, 128 * 16 + 16
    layer = attention + 2 * 128
    count = parameter_count(recipe)
    assert count.embedding == 2 * 256 * 128
    assert count.dense == 4 * layer + 3 * 128 * 384 + 3 * (expert + router) + 128
    assert count.experts == 3 * 16 * expert
    assert count.mtp == layer + 17 * expert + router + 3 * 128 + 2 * 128 * 128
    assert count.active == count.total - 3 * 12 * expert - 255 * 128
    assert parameter_count(load_recipe(TINY)).mtp == 0


def test_a_query_without_compression_and_two_shared_experts():
    recipe = load_recipe(TINY, {"model.mla.q_lora_rank": None, "model.moe.num_shared_experts": 2})
    # What Megatron-Core builds for this recipe (0.16.1): 1,768,704 parameters and 48 biases of experts.
    assert parameter_count(recipe).total == 1_768_752


def test_memory_of_the_published_model():
    recipe = load_recipe(V3)
    memory = memory_per_rank(recipe)
    assert len(memory) == 16
    # Ranks of a stage hold 64 different expert shards and the same dense part: together the whole model, once.
    count, table = parameter_count(recipe), 129280 * 7168
    # Over all expert shards, a second input embedding for MTP, and no expert bias (58 layers and MTP): not trained.
    experts = sum(4 * 3 * 7168 * 2048 * (len([n for n in s.layers if n >= 3]) + s.mtp_layers) for s in stages(recipe))
    dense = sum(m.parameters for m in memory) - experts
    assert 64 * experts + dense == count.total + count.mtp + table - 59 * 256
    for stage in memory:
        assert stage.weights == 2 * stage.parameters
        assert stage.gradients == 4 * stage.parameters
        assert stage.total == stage.weights + stage.gradients + stage.optimizer
    middle = 4 * (4 * 3 * 7168 * 2048), memory[1].parameters - 4 * (4 * 3 * 7168 * 2048)
    assert memory[1].optimizer == 12 * (math.ceil(middle[0] / 2) + math.ceil(middle[1] / 128))
    assert 12 < max(m.total for m in memory) / 2**30 < 24  # leaves room for activations on 80 GB


def test_memory_without_sharding_in_fp32():
    (stage,) = memory_per_rank(load_recipe(TINY, {"plugin.parallel.expert": 1}))
    assert stage.parameters == parameter_count(load_recipe(TINY)).total - 3 * 16  # the expert bias is a buffer
    assert (stage.weights, stage.gradients, stage.optimizer) == tuple(k * stage.parameters for k in (4, 4, 8))


def test_61_layers_over_16_stages():
    recipe = load_recipe(V3)
    held = stages(recipe)
    assert [len(stage.layers) for stage in held] == [4] * 15 + [1]
    assert [layer for stage in held for layer in stage.layers] == list(range(61))
    assert held[0].embedding
    assert held[-1].head
    assert [stage.mtp_layers for stage in held] == [0] * 15 + [1]


def test_an_uneven_split_needs_a_layout_and_the_suggested_one_works():
    with pytest.raises(ConfigError, match=r"model.num_layers = 61: must be a multiple of 16 stages") as caught:
        load_recipe(V3, {"megatron.pipeline_model_parallel_layout": None})
    layout = caught.value.allowed.rpartition("for example ")[2].strip("'")
    lengths = [len(s.layers) for s in stages(load_recipe(V3, {"megatron.pipeline_model_parallel_layout": layout}))]
    assert sum(lengths) == 61
    assert set(lengths) <= {3, 4}


def test_virtual_stages_go_round_the_ranks():
    changes = {"train.processes": 8, "plugin.parallel.pipeline": 2, "plugin.parallel.virtual_pipeline": 2}
    recipe = load_recipe(TINY, changes | {"train.micro_batch_size": 1})
    assert [stage.layers for stage in stages(recipe)] == [(0, 2), (1, 3)]
    assert arguments(recipe)["--num-virtual-stages-per-pipeline-rank"] == ["2"]


@pytest.mark.parametrize(
    ("changes", "key", "allowed"),
    [
        ({"plugin.parallel.expert": 3}, "parallel.expert", "must divide the 16 experts"),
        ({"train.processes": 6}, "parallel.expert", "world size of 6"),
        ({"train.processes": 2}, "parallel.expert", "world size of 2"),
        ({"model.first_dense_layers": 5}, "model.first_dense_layers", "at most model.num_layers (4)"),
        ({"model.moe.top_k": 17}, "model.moe.top_k", "at most model.moe.num_experts (16)"),
        ({"model.moe.top_k": 9}, "model.moe.top_k", "at most 8, the experts in 2 groups"),
        ({"model.moe.top_k": 1}, "model.moe.group_top_k", "top_k (1)"),
        ({"model.moe.num_groups": 5}, "model.moe.num_groups", "must divide model.moe.num_experts (16)"),
        ({"model.moe.group_top_k": 5}, "model.moe.group_top_k", "at most num_groups (4)"),
        ({"model.moe.num_groups": None}, "model.moe.num_groups", "give both or neither"),
        ({"model.moe.group_top_k": None}, "model.moe.group_top_k", "give both or neither"),
        ({"model.moe.score_function": "softmax"}, "model.moe.score_function", "must be 'sigmoid'"),
        ({"model.mla.qk_pos_emb_head_dim": 15}, "model.mla.qk_pos_emb_head_dim", "must be even"),
        ({"train.global_batch_size": 12}, "train.global_batch_size", "must be a multiple of 8"),
        ({"train.min_lr": 1.0}, "train.min_lr", "at most train.lr (0.001)"),
        ({"train.steps": 2}, "train.warmup_steps", "must be below train.steps (2)"),
        ({"train.overlap_param_gather": True}, "train.overlap_param_gather", "needs distributed_optimizer"),
        ({"model.seq_length": 127, "plugin.parallel.tensor": 2}, "model.seq_length", "must be a multiple of 2"),
        ({"model.seq_length": 126, "plugin.parallel.context": 2}, "model.seq_length", "must be a multiple of 4"),
        ({"model.num_attention_heads": 5, "plugin.parallel.tensor": 2}, "model.num_attention_heads", "a multiple of"),
        ({"model.vocab_size": 257, "plugin.parallel.tensor": 2}, "model.vocab_size", "a multiple of"),
        ({"model.ffn_hidden_size": 383, "plugin.parallel.tensor": 2}, "model.ffn_hidden_size", "a multiple of"),
        ({"plugin.parallel.virtual_pipeline": 2}, "parallel.virtual_pipeline", "must be 1"),
        ({"megatron.moe_router_topk": 2}, "megatron.moe_router_topk", "is decided by model.moe.top_k"),
        ({"megatron.pipeline_model_parallel_layout": "Et*3L"}, "megatron.pipeline_model_parallel_layout", "4 x t"),
        (
            {"megatron.pipeline_model_parallel_layout": "Et*2|t*2L"},
            "megatron.pipeline_model_parallel_layout",
            "1 stages",
        ),
        ({"megatron.pipeline_model_parallel_layout": "Etxt"}, "megatron.pipeline_model_parallel_layout", "'xt' is not"),
        (
            {"megatron.pipeline_model_parallel_layout": [["t"]]},
            "megatron.pipeline_model_parallel_layout",
            "layout string",
        ),
        ({"train.stepz": 4}, "train.stepz", "did you mean 'steps'"),
        ({"train.steps": "4"}, "train.steps", "must be a valid integer"),
        ({"train.steps.more": 4}, "train.steps.more", "only keys of a section"),
        ({"train.lr": float("nan")}, "train.lr", "finite"),
        ({"name": "../evil"}, "name", "match pattern"),
        ({"plugin.parallel.exprt": 4}, "plugin.parallel.exprt", "did you mean 'expert'"),
    ],
)
def test_mistakes_name_the_key_and_what_is_allowed(changes, key, allowed):
    with pytest.raises(ConfigError) as caught:
        load_recipe(TINY, changes)
    assert caught.value.key == key
    assert allowed in caught.value.allowed
    assert caught.value.source.startswith(str(TINY))
    assert "\n" not in str(caught.value)


def test_overrides_may_be_nested():
    changes = {
        "train": {"steps": 7},
        "plugin": {"parallel": {"expert": 2}},
        "megatron": {"recompute_granularity": "full"},
    }
    recipe = load_recipe(TINY, changes)
    assert (recipe.train.steps, recipe.degree("expert")) == (7, 2)
    assert recipe.megatron == {"recompute_granularity": "full"}
    assert recipe.train.global_batch_size == load_recipe(TINY).train.global_batch_size
    with pytest.raises(ConfigError, match=r"plugin = 3: only keys of a section"):
        load_recipe(TINY, {"plugin": 3})


def test_layouts_with_mtp():
    changes = {"train.processes": 8, "plugin.parallel.pipeline": 2, "model.mtp_layers": 1}
    key = "megatron.pipeline_model_parallel_layout"
    recipe = load_recipe(TINY, changes | {key: "E(tt)*1,t|tm,L"})
    assert [stage.layers for stage in stages(recipe)] == [(0, 1, 2), (3,)]
    for wrong in ("Ettt|tL", "Etttm|tL", "ttt|tmL"):
        with pytest.raises(ConfigError, match="in this order"):
            load_recipe(TINY, changes | {key: wrong})


def test_the_plugin_may_be_a_file(tmp_path):
    data = yaml.safe_load(TINY.read_text()) | {"plugin": "plugins/mine.yaml"}
    (tmp_path / "plugins").mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=r"mine.yaml: .*can't be read"):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "plugins" / "mine.yaml").write_text("parallel: {expert: 2}")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.degree("expert") == 2
    assert recipe.plugin.source == str(tmp_path / "plugins" / "mine.yaml")
    assert load_recipe(tmp_path / "recipe.yaml", {"plugin.parallel.expert": 4}).degree("expert") == 4
    (tmp_path / "plugins" / "mine.yaml").write_text("parallel: {expert: 5}")
    with pytest.raises(ConfigError, match=r"mine.yaml: parallel.expert = 5: must divide"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_without_plugin_runs_on_one_rank(tmp_path):
    data = yaml.safe_load(TINY.read_text())
    del data["plugin"]
    data["train"]["processes"] = 1
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    assert load_recipe(path).degree("expert") == 1
    path.write_text(yaml.safe_dump(data | {"plugin": 5}))
    with pytest.raises(ConfigError, match="plugin = 5: must be a mapping"):
        load_recipe(path)


def test_megatron_arguments_of_the_published_model():
    flags = arguments(load_recipe(V3), config_path="x.yaml")
    for flag, value in {
        "--num-layers": "61",
        "--hidden-size": "7168",
        "--q-lora-rank": "1536",
        "--moe-layer-freq": "[0]*3+[1]*58",
        "--num-experts": "256",
        "--moe-router-topk": "8",
        "--moe-router-num-groups": "8",
        "--moe-router-group-topk": "4",
        "--moe-router-score-function": "sigmoid",
        "--moe-router-topk-scaling-factor": "2.5",
        "--moe-shared-expert-intermediate-size": "2048",
        "--moe-token-dispatcher-type": "flex",
        "--moe-flex-dispatcher-backend": "epv2",
        "--expert-model-parallel-size": "64",
        "--pipeline-model-parallel-size": "16",
        "--pipeline-model-parallel-layout": "Et*4|(t*4|)*14tmL",
        "--mtp-num-layers": "1",
        "--global-batch-size": "15360",
        "--epv2-config": "x.yaml",
        "--data-path": "data/corpus_text_document",
    }.items():
        assert flags[flag] == [value]
    for flag in ("--multi-latent-attention", "--bf16", "--use-distributed-optimizer", "--swiglu", "--moe-grouped-gemm"):
        assert flags[flag] == []
    assert flags["--recompute-modules"] == ["core_attn", "mla_up_proj"]
    assert not {"--sequence-parallel", "--transformer-impl", "--mock-data"} & set(flags)


def test_megatron_arguments_of_the_tiny_model():
    flags = arguments(load_recipe(TINY))
    assert flags["--transformer-impl"] == ["local"]
    assert "--no-rope-fusion" in flags
    assert "--mock-data" in flags
    assert not {"--bf16", "--mtp-num-layers", "--epv2-config", "--moe-aux-loss-coeff"} & set(flags)
    changes = {
        "megatron.overlap_p2p_comm": False,
        "megatron.layernorm_epsilon": 1e-5,
        "megatron.bias_dropout_fusion": True,
    }
    flags = arguments(load_recipe(TINY, changes | {"megatron.moe_shared_expert_overlap": False}))
    assert flags["--norm-epsilon"] == ["1e-05"]
    assert "--no-overlap-p2p-communication" in flags
    assert not {"--no-bias-dropout-fusion", "--moe-shared-expert-overlap"} & set(flags)
    for changes, key in (
        ({"model.rotary_base": 0.5}, "model.rotary_base"),
        ({"megatron.batch_p2p_comm": False}, "megatron.batch_p2p_comm"),
    ):
        with pytest.raises(ConfigError) as caught:
            megatron_args(load_recipe(TINY, changes))
        assert caught.value.key == key


def test_megatron_arguments_of_the_proxy():
    flags = arguments(load_recipe(PROXY))
    assert flags["--moe-layer-freq"] == ["[0]*0+[1]*1"]
    assert flags["--num-experts"] == ["16"]
    for flag in ("--bf16", "--moe-shared-expert-overlap", "--use-distributed-optimizer", "--mock-data"):
        assert flags[flag] == []
    assert "--transformer-impl" not in flags


def test_megatron_lm_knows_every_argument():
    """Megatron-Core's newer wheels bring Megatron-LM's own parser along."""
    module = pytest.importorskip("megatron.training.arguments", reason="this megatron-core has no megatron.training")
    parser = module.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    for path in (TINY, SMALL, V3, PROXY):
        words = megatron_args(load_recipe(path))
        place = words.index("--moe-flex-dispatcher-backend")  # the launcher adds our name to the choices
        args = parser.parse_args(words[:place] + words[place + 2 :])
        assert args.num_experts == load_recipe(path).model.moe.num_experts
        assert sum(args.moe_layer_freq) == args.num_layers - load_recipe(path).model.first_dense_layers


def cli(*words: str) -> int:
    return main(["recipe-args", *words])


def test_the_printed_command_is_a_shell_script(capsys, tmp_path, monkeypatch):
    assert cli(str(V3)) == 0
    script = capsys.readouterr().out
    assert "torchrun --nproc-per-node 8 --nnodes 256" in script
    assert "-m epv2_plugin.launch pretrain_gpt.py" in script
    monkeypatch.chdir(tmp_path)
    shell = subprocess.run(
        ["bash", "-eu", "-c", "torchrun() { printf '%s\\n' \"$@\"; }\nMASTER_ADDR=node0\n" + script],
        capture_output=True,
        text=True,
        check=True,
    )
    words = shell.stdout.splitlines()
    written = "deepseek_v3_671b.plugin.yaml"
    assert words[words.index("pretrain_gpt.py") + 1 :] == megatron_args(load_recipe(V3), written)
    assert yaml.safe_load((tmp_path / written).read_text())["parallel"]["expert"] == 64
    assert cli(str(TINY)) == 0
    assert "torchrun --nproc-per-node 4 -m" in capsys.readouterr().out


def test_counts_are_printed(capsys):
    assert cli("--count", str(V3)) == 0
    text = capsys.readouterr().out
    assert "671,026,419,200" in text
    assert "1-14" in text


def test_a_wrong_recipe_is_one_line_on_stderr(capsys):
    assert cli("nowhere.yaml") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("epv2: nowhere.yaml: ")
    assert err.count("\n") == 1


def test_a_plugin_configuration_is_not_taken_for_a_recipe() -> None:
    path = Path(__file__).parents[1] / "configs" / "cpu.yaml"
    with pytest.raises(ConfigError, match=r"must be a recipe .* these are keys of a plugin configuration"):
        load_recipe(path)
