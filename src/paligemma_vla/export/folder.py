"""The exported folder, complete under its name or not there. Each fact stands in one file:

    config.json                 the run's configuration, the backbone's architecture, what the data meant, how training ended,
                                and the sha256 of the other files
    model.safetensors           weights, in shards with model.safetensors.index.json beyond 5 GB
    normalization_stats.json    statistics of state and action
    tokenizer.json, tokenizer_config.json, processor_config.json     a PaliGemmaProcessor for transformers; we read two of them
    README.md                   the model card: for people, read by no program of ours

`policy.load_trained` reads it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from paligemma_vla import versions
from paligemma_vla.config import RUN_STATISTICS
from paligemma_vla.errors import CheckpointError, first_line
from paligemma_vla.export.card import Measurement, model_card
from paligemma_vla.export.programs import save_program
from paligemma_vla.policy import CONFIG, FORMAT, IMAGE_SETTINGS, MODEL_TYPE, TOKENIZER, Policy, read_config
from paligemma_vla.preprocess import ImageSpec, PromptEncoder
from paligemma_vla.storage import atomic_write, sha256

CARD = "README.md"
SHARD: int | str = "5GB"  # largest file of weights: what the hub recommends
# Names that an export writes: a folder that holds nothing else may be replaced by another export.
WRITTEN = re.compile(
    r"config\.json|README\.md|normalization_stats\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|\w+\.pt2|"
    r"(tokenizer|tokenizer_config|processor_config|special_tokens_map|added_tokens)\.json"
)


def write_export(
    output: Path,
    policy: Policy,
    dtype: str = "float32",
    program: str | None = None,
    measurements: Sequence[Measurement] = (),
) -> Path:
    """Write a policy into the folder `output`, in place of an earlier export there; returns `output`.

    policy: made with `device=None`, its weights as they were trained. dtype: of the weights in the file; a policy computes as
    its configuration says, whatever they were stored in. program: `sampler` or `model`, to add as a `torch.export` program.
    measurements: for the model card. Raises `CheckpointError` when `output` holds something else, or cannot be written; it is
    untouched then.
    """
    output = Path(os.path.realpath(output))  # a link stays one, and the folder behind it is written
    check_replaceable(output)
    with staged(output) as folder:
        _write_weights(folder, policy.model.state_dict(), getattr(torch, dtype))
        policy.preprocessor.statistics.save(folder / RUN_STATISTICS)
        _write_processor(folder, policy.preprocessor.prompts, policy.preprocessor.image)
        if program is not None:
            save_program(folder, program, policy.model, policy.preprocessor, policy.config.model.action_head_config)
        (folder / CARD).write_text(model_card(policy, dtype, measurements), encoding="utf-8")
        # Last: a folder without it is no export.
        atomic_write(folder / CONFIG, f"{json.dumps(_config(folder, policy, dtype), indent=2)}\n")
    return output


def check_replaceable(output: Path) -> None:
    """Raise `CheckpointError` unless `output` is missing, empty, or an earlier export and nothing else."""
    if not output.exists():
        return
    if not output.is_dir():
        raise CheckpointError(f"{output}: a file is there, expected a folder to write; give another --output_dir")
    names = sorted(os.listdir(output))
    foreign = [name for name in names if not WRITTEN.fullmatch(name)]
    if names and (foreign or CONFIG not in names):
        shown = ", ".join((foreign or names)[:5])
        raise CheckpointError(f"{output}: holds {shown}, which no export wrote; give another --output_dir, or an empty one")
    if names:
        read_config(output)


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when all went well. What a killed call left there is removed first."""
    folder, old = (output.with_name(f".{output.name}.export.{kind}") for kind in ("tmp", "old"))
    try:
        _clear(output, folder, old)
        folder.mkdir(parents=True)
        yield folder
        if output.exists():
            output.rename(old)
        folder.rename(output)
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch.export.save wrap the system's error
        if isinstance(error, RuntimeError) and "writ" not in str(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise CheckpointError(
            f"{output}: cannot be written ({reason}); free some space, or give another --output_dir"
        ) from error
    finally:
        _clear(output, folder, old)


def _clear(output: Path, folder: Path, old: Path) -> None:
    """Remove incomplete files. The earlier export, set aside for a moment, comes back if nothing took its place."""
    if old.exists() and not output.exists():
        old.rename(output)
    for leftover in (folder, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _write_weights(folder: Path, state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    weights = {name: value.to("cpu", dtype if value.is_floating_point() else None) for name, value in state_dict.items()}
    split = split_torch_state_dict_into_shards(weights, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        save_file({name: weights[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        # safetensors keeps them from everybody else, whatever the umask
        (folder / file).chmod(stat.S_IMODE(folder.stat().st_mode) & 0o666)
    if split.is_sharded:  # where transformers and the hub look for shards; config.json names them too
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_processor(folder: Path, prompts: PromptEncoder, image: ImageSpec) -> None:
    """A `PaliGemmaProcessor` that lays out ids and pixels as `prompts` and `image` do (but for `resize: pad`)."""
    from tokenizers import Tokenizer
    from transformers import GemmaTokenizer, PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    size, mean, std = {"height": image.size, "width": image.size}, list(image.mean), list(image.std)
    images: Any = SiglipImageProcessorPil(size=size, image_mean=mean, image_std=std, resample=image.resample)
    images.image_seq_length = prompts.image_tokens
    encoder: Any = Tokenizer.from_str(prompts.tokenizer_json)
    named = {"bos_token": prompts.bos_id, "pad_token": prompts.pad_id}
    special: Any = {name: encoder.id_to_token(number) for name, number in named.items()}
    tokenizer = GemmaTokenizer(tokenizer_object=encoder, **special)
    PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    # As it is in the checkpoint: what we read back must not depend on how transformers writes it.
    (folder / TOKENIZER).write_text(prompts.tokenizer_json, encoding="utf-8")


def _config(folder: Path, policy: Policy, dtype: str) -> dict[str, Any]:
    """What config.json holds: nothing that stands in another file of the folder."""
    preprocessor = policy.preprocessor.to_dict()
    del preprocessor["statistics"], preprocessor["prompts"]["tokenizer_json"]
    for name in ("size", *IMAGE_SETTINGS.values()):
        del preprocessor["image"][name]
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["VLAModel"],
        "format": FORMAT,
        "dtype": dtype,
        "configuration": policy.config.model_dump(mode="json"),
        "backbone": policy.backbone,
        "preprocessor": preprocessor,
        "metadata": asdict(policy.robot),
        "training": policy.metadata["training"],
        "versions": policy.metadata["versions"],
        "exported_by": versions(),
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != CARD},
    }
