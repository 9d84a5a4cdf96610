# SPDX-License-Identifier: Apache-2.0
"""The settings of the server: serve.toml. They are immutable after loading."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from longlive_serve.config.presets import DECODERS, MODELS, PRESETS, TINY, WAN, ModelConfig
from longlive_serve.config.toml_files import as_toml, check_path, read_toml, typed

RANDOM_WEIGHTS = "random"  # `ServeConfig.weights` for random weights from a fixed seed
AUTO = "auto"
TORCH, FUSED, ONNXRUNTIME, TENSORRT = "torch", "fused", "onnxruntime", "tensorrt"  # the backends
LORA_EXAMPLE = '[[lora]] path = "style.safetensors", scale = 0.8, alpha = 16, a line each'
PATHS = ("weights", "graphs", "tensorrt_engines", "adapters_dir", "trace_dir")  # keys of `ServeConfig` that are paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA file to merge into the DiT: a `[[lora]]` table of the settings. Raises ValueError for invalid numbers."""

    path: Path
    """In a settings file: relative to that file."""
    scale: float = 1.0
    alpha: float = 0.0
    """The alpha used in training, which the file does not contain. 0: the rank, so that alpha / rank is 1."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale: got {self.scale}, expected a finite number")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha: got {self.alpha}, expected 0 or more")

    @classmethod
    def from_table(cls, table: object) -> Adapter:
        """`{path = "...", scale = 0.8, alpha = 16}`; scale and alpha are optional. Raises ValueError."""
        if not isinstance(table, dict):
            raise ValueError(f"got {table!r}, expected a table: {LORA_EXAMPLE}")
        if not (isinstance(table.get("path"), str) and table["path"]):
            raise ValueError(f"path: got {table.get('path')!r}, expected the name of a file")
        return cls(path=Path(check_path(table["path"])), **typed({"scale": float, "alpha": float}, table, ("path",)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The settings in serve.toml. All keys are optional."""

    BACKENDS: ClassVar[tuple[str, ...]] = (AUTO, TORCH, FUSED, ONNXRUNTIME, TENSORRT)
    VARIANTS: ClassVar[tuple[str, ...]] = ("base", "infinity")
    DTYPES: ClassVar[tuple[str, ...]] = (AUTO, "float32", "float16", "bfloat16")

    preset: str = "tiny"
    """Sizes of the models: a name in PRESETS."""
    weights: str = RANDOM_WEIGHTS
    """A folder of checkpoints, or `random` for weights made from a fixed seed. In a file: relative to that file."""
    lora: tuple[Adapter, ...] = ()
    """LoRA adapters to merge into the DiT, in this order. Empty: the lora.pt beside longlive_base.pt, if there is one.
    A list replaces it; name it as well to keep it."""
    use_ema: bool = False
    """The averaged weights in longlive_base.pt (`generator_ema`) instead of the last ones."""
    variant: str = "base"
    """`base`: absolute RoPE, ends after 1023 latent frames (255 s). `infinity`: relative RoPE, no end."""
    backend: str = AUTO
    """`auto`: for each model an engine if `tensorrt_engines` has one, else a graph if `graphs` has one, else torch.
    `fused`: torch with fused Triton kernels and CUDA graphs; the text encoder then runs in torch."""
    text_encoder_backend: str = ""
    """Like `backend`, for this model only; empty: the value of `backend`."""
    dit_backend: str = ""
    vae_decoder_backend: str = ""
    decoder: str = WAN
    """The decoder of the latents. `wan`: the Wan VAE, like the reference. `tiny`: TAEHV, many times faster, less
    detail, only with the backends torch and fused."""
    graphs: str = ""
    """A folder of `python -m export.to_onnx`, for the backend onnxruntime. In a file: relative to that file."""
    tensorrt_engines: str = ""
    """A folder of `python -m export.to_tensorrt`, for the backend tensorrt. In a file: relative to that file."""
    fp8: bool = False
    """FP8 (E4M3) GEMMs in the fused DiT, with a scale per token and per output channel."""
    fp8_attention: bool = False
    """With `fp8`: FP8 KV cache and attention as well, with a scale for each layer's queries, keys and values."""
    fp8_decoder: bool = False
    """FP8 convolutions in the fused Wan VAE decoder, by cuDNN on Hopper and later."""
    device: str = "auto"
    """`auto` (cuda if available, else cpu) or a torch device."""
    dtype: str = "auto"
    """`auto`: that of the graphs; in torch bfloat16 on cuda, like the reference, and float32 on the CPU."""
    slots: int = 8
    """Sessions with a slot in the KV cache. Further sessions wait for a slot, in order."""
    max_chunks_ahead: int = 1
    """Maximum number of chunks generated ahead of playback. A larger number absorbs longer disturbances, and delays new
    prompts by as much."""
    max_utilization: float = 0.75
    """Share of the time that admitted sessions with a playback clock may use. The rest is for prompt switches and
    disturbances."""
    max_waiting: int = 16
    """Maximum number of sessions that wait for a slot; further ones are refused."""
    max_wait_s: float = 30.0
    """Seconds after which a session that waits for a slot is refused."""
    idle_timeout_s: float = 60.0
    """Seconds without requests after which a session with no pending chunks loses its slot."""
    max_unacked: int = 64
    """Chunks sent since the client's last request, after which a session pauses. The client library requests 8 chunks
    at a time, so its sessions pause earlier."""
    max_requests_per_s: int = 50
    """Maximum number of requests of one session per second; further ones are refused."""
    max_sessions_per_client: int = 0
    """Maximum number of sessions of one client, if a proxy sets the gRPC header `x-client-id`; 0: unlimited."""
    require_session_token: bool = False
    """Every session must start with a session token, which its later requests repeat."""

    adapters_dir: str = ""
    """A folder of LoRA files that can be merged into the DiT of new sessions at run time; empty: none. In a file:
    relative to that file."""
    admin_token: str = ""
    """The token for requests that change adapters, 16 characters or more."""

    trace_dir: str = ""
    """A folder for a trace of each session, for trace viewers; empty: no traces."""
    log_format: str = "text"
    """`text`, or `json`: one object per line."""

    def __post_init__(self) -> None:
        _check_choice("log_format", self.log_format, ("text", "json"))
        _check_choice("preset", self.preset, tuple(PRESETS))
        _check_choice("variant", self.variant, self.VARIANTS)
        _check_choice("backend", self.backend, self.BACKENDS)
        _check_choice("decoder", self.decoder, DECODERS)
        decoded_by = self.vae_decoder_backend or self.backend
        if self.decoder == TINY and decoded_by in (ONNXRUNTIME, TENSORRT):
            raise ValueError(
                f"decoder: got {TINY!r} with the backend {decoded_by}, which has only the Wan VAE; "
                f'expected vae_decoder_backend = "{TORCH}" or decoder = "{WAN}"'
            )
        for model in MODELS:
            _check_choice(f"{model}_backend", getattr(self, f"{model}_backend"), ("", *self.BACKENDS))
        asked = {self.backend, *(getattr(self, f"{model}_backend") for model in MODELS)}
        for backend, key in ((ONNXRUNTIME, "graphs"), (TENSORRT, "tensorrt_engines")):
            if backend in asked and not getattr(self, key):
                raise ValueError(f"{key}: got nothing, expected a folder for the backend {backend}")
        self._check_fp8(FUSED in asked, decoded_by)
        _check_choice("dtype", self.dtype, self.DTYPES)
        least_of = {"slots": 1, "max_chunks_ahead": 1, "max_waiting": 0, "max_unacked": 1}
        for key, least in (least_of | {"max_requests_per_s": 1, "max_sessions_per_client": 0}).items():
            if getattr(self, key) < least:
                raise ValueError(f"{key}: got {getattr(self, key)}, expected {least} or more")
        for key in ("idle_timeout_s", "max_wait_s"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key}: got {getattr(self, key)}, expected a number of seconds more than 0")
        if self.adapters_dir and len(self.admin_token) < 16:
            raise ValueError("admin_token: got less than 16 characters, expected 16 or more with an adapters_dir")
        if not 0 < self.max_utilization <= 1:
            raise ValueError(f"max_utilization: got {self.max_utilization}, expected more than 0 and at most 1")

    def _check_fp8(self, has_fused: bool, decoded_by: str) -> None:
        if self.fp8 and not has_fused:
            raise ValueError(f"fp8: got true with backend {self.dit_backend or self.backend}, expected {FUSED}")
        if self.fp8_attention and not self.fp8:
            raise ValueError("fp8_attention: got true without fp8, expected fp8 = true as well")
        if self.fp8_decoder and (decoded_by, self.decoder) != (FUSED, WAN):
            raise ValueError(
                f"fp8_decoder: got true with backend {decoded_by} and decoder {self.decoder}, "
                f"expected {FUSED} and {WAN}"
            )

    @property
    def model_config(self) -> ModelConfig:
        return PRESETS[self.preset]

    @classmethod
    def from_toml(cls, path: Path | str) -> ServeConfig:
        """Read a settings file. Raises ValueError that names the file and the key."""
        values = read_toml(path)
        try:
            folder = Path(path).absolute().parent
            return cls._from_values(values).with_paths(lambda named: folder / named)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> ServeConfig:
        lora = values.pop("lora", [])
        if not isinstance(lora, list):
            raise ValueError(f"lora: got {lora!r}, expected one or more tables: {LORA_EXAMPLE}")
        adapters = []
        for number, table in enumerate(lora, 1):
            try:
                adapters.append(Adapter.from_table(table))
            except ValueError as error:
                raise ValueError(f"lora, table {number} of {len(lora)}: {error}") from None
        kinds = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        found = typed(kinds, values)
        for key in PATHS:
            try:
                check_path(found.get(key, ""))
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        return cls(lora=tuple(adapters), **found)

    def with_paths(self, change: Callable[[Path], Path]) -> ServeConfig:
        """A copy with `change` applied to every path of a file or folder."""
        paths = {key: getattr(self, key) for key in PATHS}
        changed: dict[str, Any] = {
            key: str(change(Path(path))) for key, path in paths.items() if path not in ("", RANDOM_WEIGHTS)
        }
        changed["lora"] = tuple(dataclasses.replace(adapter, path=change(adapter.path)) for adapter in self.lora)
        return dataclasses.replace(self, **changed)

    def to_toml(self) -> str:
        """The settings as TOML that `from_toml` can read."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "lora"}
        tables = [{"path": str(one.path), "scale": one.scale, "alpha": one.alpha} for one in self.lora]
        return as_toml(values, {"lora": tables})


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}: got {value!r}, expected one of {list(choices)}")
