# SPDX-License-Identifier: Apache-2.0
"""Where each model's file lies in a folder of weights.

Called by `checkpoint` and `weights`, and by those who copy such folders. It opens no file. Layouts, in one folder even
mixed (the first that has the model counts):

* what `quantization/` writes: MODEL.quantized.safetensors;
* what `python -m export.convert` writes: MODEL.safetensors and tokenizer/;
* that of the reference: wan_models/Wan2.1-T2V-1.3B/ and, with the DiT and its adapter, longlive_models/models/;
* flat: the files of Wan2.1-T2V-1.3B, longlive_base.pt and its lora.pt side by side;
* that of a WanPipeline of diffusers: transformer/, vae/, text_encoder/, tokenizer/.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from longlive_serve.config.presets import DIT, TEXT_ENCODER, TINY_DECODER, VAE_DECODER
from longlive_serve.config.serve_config import RANDOM_WEIGHTS
from longlive_serve.weights import diffusers_mapping
from longlive_serve.weights.tensor_files import INDEX

DIT_FILE = "diffusion_pytorch_model.safetensors"
VAE_FILE = "Wan2.1_VAE.pth"
TINY_DECODER_FILE = "taew2_1.pth"  # published as .safetensors as well
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
FILES = {TEXT_ENCODER: TEXT_ENCODER_FILE, DIT: DIT_FILE, VAE_DECODER: VAE_FILE, TINY_DECODER: TINY_DECODER_FILE}
LONGLIVE_FILE = "longlive_base.pt"
LORA_FILE = "lora.pt"
WAN_FOLDER = "wan_models/Wan2.1-T2V-1.3B"
LONGLIVE_FOLDER = "longlive_models/models"

QUANTIZED_FILE = "{}.quantized.safetensors"  # under the names of our models, as the next
CONVERTED_FILE = "{}.safetensors"
CONVERTED_TOKENIZER_FOLDER = "tokenizer"  # as that of diffusers

QUANTIZED, CONVERTED, LONGLIVE, WAN, DIFFUSERS = "quantized", "converted", "LongLive's", "Wan's", "diffusers'"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A model's file, which may be an index of shards, and whose names and layout it has."""

    path: Path
    kind: str


def folder_of(weights: str) -> Path | None:
    """The folder, or None for random weights. Raises ValueError when there is none."""
    folder = None if weights == RANDOM_WEIGHTS else Path(weights)
    if folder is not None and not folder.is_dir():
        raise ValueError(
            f"weights: got {weights!r}, expected a folder with {DIT_FILE}, {VAE_FILE}, ... or {RANDOM_WEIGHTS!r}"
        )
    return folder


def find(model: str, weights: str) -> ModelFile | None:
    """The file of a model in the folder `weights`; where there is none, the one that should be there.

    None for random weights. Raises ValueError for shards of which nothing says what they hold.
    """
    folder = folder_of(weights)
    if folder is None:
        return None
    return next((file for file in _candidates(model, folder) if file.path.exists()), _published(model, folder))


def own_adapter(weights: str) -> Path | None:
    """The lora.pt that lies beside the longlive_base.pt of the folder: LongLive is both."""
    file = find(DIT, weights)
    if file is None or file.kind != LONGLIVE or not (file.path.parent / LORA_FILE).is_file():
        return None
    return file.path.parent / LORA_FILE


def tokenizer_folder(folder: Path) -> Path:
    """The tokenizer's folder in the folder of weights; it may not be there."""
    converted = folder / CONVERTED_TOKENIZER_FOLDER
    return converted if converted.is_dir() else _wan_folder(folder) / TOKENIZER_FOLDER


def _candidates(model: str, folder: Path) -> Iterator[ModelFile]:
    yield ModelFile(path=folder / QUANTIZED_FILE.format(model), kind=QUANTIZED)
    yield ModelFile(path=folder / CONVERTED_FILE.format(model), kind=CONVERTED)
    if model == DIT:
        yield ModelFile(path=_longlive_folder(folder) / LONGLIVE_FILE, kind=LONGLIVE)
    published = _published(model, folder)
    if published.kind == WAN:
        yield published
        yield ModelFile(path=published.path.with_suffix(".safetensors"), kind=WAN)
        yield ModelFile(path=published.path.with_suffix(f".safetensors{INDEX}"), kind=WAN)
    if model in diffusers_mapping.FILES and diffusers_mapping.is_diffusers(folder):
        yield from _of_diffusers(folder, diffusers_mapping.FILES[model])


def _published(model: str, folder: Path) -> ModelFile:
    if model == DIT and _has_reference_layout(folder):
        return ModelFile(path=folder / LONGLIVE_FOLDER / LONGLIVE_FILE, kind=LONGLIVE)  # Wan's own is not LongLive
    published_in = folder if model == TINY_DECODER else _wan_folder(folder)
    return ModelFile(path=published_in / FILES[model], kind=WAN)


def _of_diffusers(folder: Path, pattern: str) -> Iterator[ModelFile]:
    """The file of one model: whole, or the index of its shards."""
    whole = folder / pattern.replace("*", "")
    found = sorted(folder.glob(pattern))
    if whole in found:
        yield ModelFile(path=whole, kind=DIFFUSERS)
    elif (index := whole.with_name(whole.name + INDEX)).exists():
        yield ModelFile(path=index, kind=DIFFUSERS)
    elif len(found) > 1:
        raise ValueError(f"{index}: no such file, but shards: expected it to say what they hold. Fetch it")
    else:
        yield from (ModelFile(path=path, kind=DIFFUSERS) for path in found)


def _has_reference_layout(folder: Path) -> bool:
    return any((folder / part).is_dir() for part in (WAN_FOLDER, LONGLIVE_FOLDER))


def _wan_folder(folder: Path) -> Path:
    return folder / WAN_FOLDER if _has_reference_layout(folder) else folder


def _longlive_folder(folder: Path) -> Path:
    return folder / LONGLIVE_FOLDER if _has_reference_layout(folder) else folder
