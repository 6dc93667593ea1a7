# SPDX-License-Identifier: Apache-2.0
"""Will a recipe fit? Parameters, memory of one GPU and tokens of a batch, without weights, GPUs or downloads.

python examples/rba_plan.py --config-name=rba_8b plan.gpu_gib=80 plan.json=plan.json

Any override of the recipe works. While model.folder is not there, shapes are those of conf/plan/: another folder with a
config.json by plan.llm=<folder>, its fields by plan.llm.hidden_size=..., another file of conf/plan/ by plan=<name>.
"""

import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # shapes are made on the meta device, also where there is a GPU

import torch
from hydra.utils import instantiate
from nemo.core.config import hydra_runner
from omegaconf import DictConfig, OmegaConf

from nemo_rba.algorithms.representation import RepresentationLoss
from nemo_rba.conversion.families import gpt_arguments
from nemo_rba.conversion.foreign import refuse_foreign_code
from nemo_rba.conversion.hf import config_from_dict, expected_tensors, load_hf_config, read_json
from nemo_rba.modules.states import chosen_layers
from nemo_rba.plan.memory import Sizes, judging_bytes, total_parameters
from nemo_rba.plan.report import GIB, Job, make_plan, render
from nemo_rba.plan.shapes import Layout, Stage, build_perception, build_stages, num_frames


def shapes(cfg: DictConfig) -> tuple:
    """(Hugging Face config of the language model, perception config, where they come from)."""
    folder, source = Path(cfg.model.get("folder") or ""), "model.folder"
    if isinstance(cfg.plan.llm, str):
        llm, source = load_hf_config(cfg.plan.llm), "plan.llm"
    elif (folder / "llm_backbone" / "config.json").is_file():
        llm = load_hf_config(folder / "llm_backbone")
    else:
        llm, source = config_from_dict(OmegaConf.to_container(cfg.plan.llm)), "plan.llm (model.folder is not there)"
    if (folder / "config.json").is_file():
        perception = read_json(folder / "config.json")["perception"]
    else:
        perception = OmegaConf.to_container(cfg.plan.perception)
    refuse_foreign_code(perception, "perception")
    return llm, perception | {"output_dim": llm.hidden_size}, source


def teacher_memory(cfg: DictConfig, llm, answers: int, tokens: int) -> tuple[int, int]:
    """Bytes of the teacher's weights, and of judging ``answers`` answers; a folder that is absent is the student's."""
    path = Path(cfg.teacher.get("path") or "")
    config = load_hf_config(path) if (path / "config.json").is_file() else llm
    itemsize = getattr(torch, cfg.teacher.dtype).itemsize
    weights = itemsize * sum(torch.Size(shape).numel() for shape in expected_tensors(config).values())
    judging = judging_bytes(
        rows=min(cfg.teacher.batch_size, answers), tokens=tokens, prompt_tokens=cfg.plan.prompt_tokens,
        vocabulary=config.vocab_size, ffn=config.intermediate_size, itemsize=itemsize,
    )  # fmt: skip
    return weights, judging


def make_sizes(cfg: DictConfig, arguments: dict) -> Sizes:
    """One rank's share of the language model."""
    model, tp = arguments["transformer"], cfg.model.tensor_model_parallel_size
    return Sizes(
        hidden=model["hidden_size"],
        ffn=model["ffn_hidden_size"] // tp,
        heads=model["num_attention_heads"] // tp,
        groups=model["num_query_groups"] // tp,
        head_dim=model["kv_channels"],
        vocabulary=arguments["vocab_size"] // tp,
        tensor_parallel_size=tp,
        sequence_split=tp if cfg.model.sequence_parallel else 1,
        itemsize=getattr(torch, cfg.model.params_dtype).itemsize,
        qk_norm=model["qk_layernorm"],
        on_gpu=cfg.trainer.accelerator == "gpu",
    )


def make_job(cfg: DictConfig, llm, layout: Layout, frames: int, adapter_width: int) -> Job:
    """The recipe's batches, answers and models."""
    objective, generates = instantiate(cfg.objective), "max_new_tokens" in cfg.rollouts
    group_size = cfg.rollouts.group_size if generates else 1
    tokens = cfg.rollouts.max_new_tokens if generates else cfg.data.max_response_tokens
    judged = objective.needs_teacher or objective.teacher_topk
    device = str(cfg.teacher.get("device", "")).replace("gpu", "cuda")
    teacher = judged and device.startswith(cfg.trainer.accelerator.replace("gpu", "cuda"))
    weights, judging = teacher_memory(cfg, llm, cfg.data.batch_size * group_size, tokens) if teacher else (0, 0)
    decode = cfg.policy.get("decode") or {"prompt_multiple": 0, "keep": False}
    return Job(
        layout=layout,
        batch_size=cfg.data.batch_size,
        num_minibatches=cfg.num_minibatches,
        ppo_epochs=cfg.ppo_epochs,
        micro_batch_size=cfg.policy.micro_batch_size,
        generation_batch_size=cfg.policy.generation_batch_size,
        group_size=group_size,
        answer_tokens=tokens,
        generates=generates,
        top_p=generates and cfg.rollouts.top_p < 1,
        validation_batch_size=cfg.data.validation_batch_size,
        validation_tokens=cfg.validation.max_new_tokens,
        prompt_tokens=cfg.plan.prompt_tokens,
        frames=frames,
        adapter_width=adapter_width,
        needs_reference=objective.needs_reference or cfg.get("representation") is not None,
        compared_layers=_compared_layers(cfg, llm),
        prompt_multiple=decode["prompt_multiple"],
        keeps_cache=decode["keep"],
        teacher_bytes=weights,
        judging_bytes=judging,
        recompute=cfg.policy.recompute,
        distributed_optimizer=cfg.policy.distributed_optimizer,
        gpu_bytes=int(cfg.plan.gpu_gib * GIB),
        reserved_bytes=int(cfg.plan.reserved_gib * GIB) if cfg.trainer.accelerator == "gpu" else 0,
    )


def _compared_layers(cfg: DictConfig, llm) -> int:
    """Of a loss on hidden states; a reward on them needs less than an update does."""
    term = instantiate(cfg.get("representation"))
    if not isinstance(term, RepresentationLoss):
        return 0
    return len(chosen_layers(term.layers, llm.num_hidden_layers))


def plan(cfg: DictConfig) -> dict:
    """The plan of a composed recipe.

    Raises:
        ValueError: a layout that does not divide, an unsupported model, or a freeze pattern without a match.
    """
    if not isinstance(cfg.trainer.devices, int) or cfg.trainer.devices < 1:
        raise ValueError(f"trainer.devices is {cfg.trainer.devices!r}; expected a number of GPUs, as trainer.devices=8")
    llm, perception_config, source = shapes(cfg)
    layout = Layout(
        world_size=cfg.trainer.devices * cfg.trainer.num_nodes,
        tensor_parallel_size=cfg.model.tensor_model_parallel_size,
        pipeline_parallel_size=cfg.model.pipeline_model_parallel_size,
        sequence_parallel=cfg.model.sequence_parallel,
    )
    dtype, arguments = getattr(torch, cfg.model.params_dtype), gpt_arguments(llm)
    perception = build_perception(perception_config, dtype)
    stages = build_stages(
        gpt_arguments=arguments, perception=perception, params_dtype=dtype, layout=layout, lora=cfg.policy.lora,
        freeze=cfg.policy.freeze,
    )  # fmt: skip
    frames = num_frames(perception, cfg.data.max_duration_seconds)
    width = perception_config["modality_adapter"].get("d_model", llm.hidden_size)
    made = make_plan(stages, make_sizes(cfg, arguments), make_job(cfg, llm, layout, frames, width))
    return {"name": cfg.name, "shapes": source, "notes": notes(cfg, stages)} | made


def notes(cfg: DictConfig, stages: list[Stage]) -> list[str]:
    """What this plan leaves out for this recipe."""
    left_out = []
    if total_parameters(stages, part="encoder", trained=True):
        left_out.append("the trained encoder's activations are not counted; policy.freeze leaves it trained")
    return left_out


@hydra_runner(config_path="../conf", config_name="rba_8b")
def main(cfg: DictConfig) -> None:
    try:
        made = plan(cfg)
    except ValueError as error:
        raise SystemExit(f"no plan: {error}") from error
    print(f"{made['name']}, shapes from {made['shapes']}\n{render(made)}")
    if cfg.plan.json:
        Path(cfg.plan.json).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    chosen = [argument for argument in sys.argv[1:] if argument.lstrip("+").startswith("plan=")]
    others = [argument for argument in sys.argv[1:] if argument not in chosen]
    sys.argv[1:] = [*others, *(f"+{name.lstrip('+')}" for name in chosen or ["plan=llama_3_1_8b"])]
    main()
