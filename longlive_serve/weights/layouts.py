# SPDX-License-Identifier: Apache-2.0
"""Finds each model's file in a weights folder, without opening any.

Called once per folder, by `loader.ModelLoader` and by the doctor. A folder may mix these layouts; for each model the
first one that contains it is used:

* output of `quantization/`: MODEL.quantized.safetensors;
* output of `python -m export.convert`: MODEL.safetensors and tokenizer/;
* reference: wan_models/Wan2.1-T2V-1.3B/ and, with the DiT and its adapter, longlive_models/models/;
* flat: the files of Wan2.1-T2V-1.3B, longlive_base.pt and its lora.pt in one folder;
* diffusers' WanPipeline: transformer/, vae/, text_encoder/, tokenizer/.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from longlive_serve.config.presets import DIT, MODELS, TEXT_ENCODER, TINY_DECODER, VAE_DECODER
from longlive_serve.config.serve_config import RANDOM_WEIGHTS
from longlive_serve.weights import diffusers_mapping
from longlive_serve.weights.tensor_files import INDEX

DIT_FILE = "diffusion_pytorch_model.safetensors"
VAE_FILE = "Wan2.1_VAE.pth"
TINY_DECODER_FILE = "taew2_1.pth"  # also published as .safetensors
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
FILES = {TEXT_ENCODER: TEXT_ENCODER_FILE, DIT: DIT_FILE, VAE_DECODER: VAE_FILE, TINY_DECODER: TINY_DECODER_FILE}
LONGLIVE_FILE = "longlive_base.pt"
LORA_FILE = "lora.pt"
WAN_FOLDER = "wan_models/Wan2.1-T2V-1.3B"
LONGLIVE_FOLDER = "longlive_models/models"

QUANTIZED_FILE = "{}.quantized.safetensors"  # {}: the name of the model, also below
CONVERTED_FILE = "{}.safetensors"
CONVERTED_TOKENIZER_FOLDER = "tokenizer"  # the same name as in diffusers

QUANTIZED, CONVERTED, LONGLIVE, WAN, DIFFUSERS = "quantized", "converted", "LongLive's", "Wan's", "diffusers'"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """A model's file, which may be an index of shards, and its layout."""

    path: Path
    kind: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsFolder:
    """A resolved folder of weights."""

    path: Path
    files: Mapping[str, CheckpointFile]
    """By model: the existing file, else the expected one."""
    tokenizer: Path
    """The tokenizer's folder; it may not exist."""
    lora: Path | None
    """The lora.pt beside longlive_base.pt: LongLive consists of both."""

    @classmethod
    def resolve(cls, weights: str) -> WeightsFolder | None:
        """None for random weights. Raises ValueError if the folder does not exist."""
        if weights == RANDOM_WEIGHTS:
            return None
        path = Path(weights)
        if not path.is_dir():
            raise ValueError(
                f"weights: got {weights!r}, expected a folder with {DIT_FILE}, {VAE_FILE}, ... or {RANDOM_WEIGHTS!r}"
            )
        files = {model: _find(model, path) for model in (*MODELS, TINY_DECODER)}
        lora = files[DIT].path.with_name(LORA_FILE)
        has_lora = files[DIT].kind == LONGLIVE and lora.is_file()
        return cls(path=path, files=files, tokenizer=_tokenizer_folder(path), lora=lora if has_lora else None)


def _tokenizer_folder(folder: Path) -> Path:
    converted = folder / CONVERTED_TOKENIZER_FOLDER
    return converted if converted.is_dir() else _wan_folder(folder) / TOKENIZER_FOLDER


def _find(model: str, folder: Path) -> CheckpointFile:
    published = _published(model, folder)
    candidates = _candidates(model, folder, published)
    return next((file for file in candidates if file.path.exists() or file.kind == DIFFUSERS), published)


def _candidates(model: str, folder: Path, published: CheckpointFile) -> Iterator[CheckpointFile]:
    yield CheckpointFile(path=folder / QUANTIZED_FILE.format(model), kind=QUANTIZED)
    yield CheckpointFile(path=folder / CONVERTED_FILE.format(model), kind=CONVERTED)
    if model == DIT:
        longlive = folder / LONGLIVE_FOLDER if _has_reference_layout(folder) else folder
        yield CheckpointFile(path=longlive / LONGLIVE_FILE, kind=LONGLIVE)
    if published.kind == WAN:
        yield published
        yield CheckpointFile(path=published.path.with_suffix(".safetensors"), kind=WAN)
        yield CheckpointFile(path=published.path.with_suffix(f".safetensors{INDEX}"), kind=WAN)
    if model in diffusers_mapping.FILES and diffusers_mapping.is_diffusers(folder):
        yield from _diffusers_files(folder, diffusers_mapping.FILES[model])


def _published(model: str, folder: Path) -> CheckpointFile:
    if model == DIT and _has_reference_layout(folder):
        return CheckpointFile(path=folder / LONGLIVE_FOLDER / LONGLIVE_FILE, kind=LONGLIVE)  # Wan's DiT is not LongLive
    published_in = folder if model == TINY_DECODER else _wan_folder(folder)
    return CheckpointFile(path=published_in / FILES[model], kind=WAN)


def _diffusers_files(folder: Path, pattern: str) -> Iterator[CheckpointFile]:
    """The file of one model: a single file, or the index of its shards, which may not exist."""
    whole = folder / pattern.replace("*", "")
    found = sorted(folder.glob(pattern))
    if whole in found:
        yield CheckpointFile(path=whole, kind=DIFFUSERS)
    elif (index := whole.with_name(whole.name + INDEX)).exists() or len(found) > 1:
        yield CheckpointFile(path=index, kind=DIFFUSERS)
    else:
        yield from (CheckpointFile(path=path, kind=DIFFUSERS) for path in found)


def _has_reference_layout(folder: Path) -> bool:
    return any((folder / part).is_dir() for part in (WAN_FOLDER, LONGLIVE_FOLDER))


def _wan_folder(folder: Path) -> Path:
    return folder / WAN_FOLDER if _has_reference_layout(folder) else folder
