"""What the commands share: their options, how a model is made, and errors of one line."""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from torch import Tensor, nn

import gtp_vit
from gtp_kernels import backends, checks
from gtp_vit import weights
from gtp_vit.config import GRAPH_TYPES, PROPAGATIONS, SELECTIONS
from gtp_vit.timing import processor_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_NOT_KWARGS = {
    "pretrained": "give --pretrained",
    "checkpoint_path": "give --weights",
    "img_size": "give --img-size",
    "num_classes": "it follows from the weights or the class folders; eval has --num-classes",
}

Command = TypeVar("Command", bound=Callable[..., Any])


def num_prop(ctx: click.Context, param: click.Parameter, value: str) -> int | tuple[int, ...]:
    """P: one number, or one per block separated by commas."""
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a number nor numbers separated by commas") from error
    return numbers[0] if len(numbers) == 1 else numbers


def model_kwargs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of timm.create_model, from `name=value` (a Python literal, or a string) or one JSON object."""
    found: dict[str, Any] = {}
    for value in values:
        name, equals, literal = value.partition("=")
        if value.lstrip().startswith("{"):
            try:
                found.update(json.loads(value))
            except json.JSONDecodeError as error:
                raise click.BadParameter(f"{value!r} is not JSON ({error})") from error
        elif equals and name.isidentifier():
            try:
                found[name] = ast.literal_eval(literal)
            except (ValueError, SyntaxError):
                found[name] = literal
        else:
            raise click.BadParameter(f"{value!r} is neither name=value nor a JSON object")
    for name, instead in _NOT_KWARGS.items():
        if name in found:
            raise click.BadParameter(f"{name} is not taken here: {instead}")
    return found


_PATCH_OPTIONS = (
    click.option(
        "--num-prop",
        metavar="P[,P...]",
        callback=num_prop,
        default="8",
        show_default=True,
        help="P, the tokens that leave in each block, or one number per block.",
    ),
    click.option(
        "--sparsity", type=float, default=0.6, show_default=True, help="θ, the share of the attention map kept."
    ),
    click.option("--alpha", type=float, default=0.2, show_default=True, help="α, how much a neighbour takes in."),
    click.option("--selection", type=click.Choice(SELECTIONS), default="MixedAttnMax", show_default=True),
    click.option("--propagation", type=click.Choice(PROPAGATIONS), default="GraphProp", show_default=True),
    click.option("--graph-type", type=click.Choice(GRAPH_TYPES), default="Mixed", show_default=True),
    click.option(
        "--num-neighbours", type=int, default=8, show_default=True, help="M, the semantic neighbours of a token."
    ),
    click.option(
        "--token-scale/--no-token-scale", default=True, show_default=True, help="Count what a token stands for."
    ),
    click.option("--semantics", type=click.Choice(checks.SEMANTICS), default="official", show_default=True),
    click.option("--gamma", type=float, default=0.25, show_default=True, help="γ of LiveGraph."),
)
PATCH_OPTIONS = (
    "num_prop",
    "sparsity",
    "alpha",
    "selection",
    "propagation",
    "graph_type",
    "num_neighbours",
    "token_scale",
    "semantics",
    "gamma",
)
_MODEL_OPTIONS = (
    click.option("--model", "name", required=True, help="A Vision Transformer of timm, lvvit_s or lvvit_m."),
    click.option(
        "--weights",
        "source",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help=".safetensors or a PyTorch checkpoint.  [default: random weights]",
    ),
    click.option("--pretrained", is_flag=True, help="timm's weights, downloaded, in place of --weights."),
    click.option(
        "--model-kwargs",
        metavar="NAME=VALUE",
        multiple=True,
        callback=model_kwargs,
        help="For timm.create_model, depth=4 say, or a JSON object; may be repeated.",
    ),
    click.option("--img-size", type=click.IntRange(min=1), help="Side of the images.  [default: the model's]"),
    click.option("--no-patch", is_flag=True, help="The model as it is: the baseline."),
)
_RUN_OPTIONS = (
    click.option("--workers", type=click.IntRange(min=0), default=4, show_default=True, help="Processes that read."),
    click.option(
        "--device", default="auto", show_default=True, help="cpu, cuda, ...; auto is cuda where there is one."
    ),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: PyTorch's choice]"),
    click.option("--backend", type=click.Choice(backends.NAMES), help="Force a backend of gtp_kernels."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
)


def patch_options(command: Command) -> Command:
    """The options of :func:`gtp_vit.patch`; their names are `PATCH_OPTIONS`."""
    return _with(command, _PATCH_OPTIONS)


def patch_options_but_num_prop(command: Command) -> Command:
    """Those of :func:`patch_options`, for a command with a ``--num-prop`` of its own."""
    return _with(command, _PATCH_OPTIONS[1:])


def model_options(command: Command) -> Command:
    """The model, its weights, and how it is patched."""
    return _with(_with(command, _PATCH_OPTIONS), _MODEL_OPTIONS)


def run_options(command: Command) -> Command:
    """Where and how a command runs."""
    return _with(command, _RUN_OPTIONS)


def _with(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def check_model_name(name: str) -> None:
    """`name` is a model of timm, or of :mod:`gtp_vit.lvvit`.

    Raises:
        click.BadParameter: it is not; the message names those that are close to it.
        ImportError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f'timm does not import ({error}): pip install "gtp-kernels[timm]"') from error
    from gtp_vit import lvvit

    if name.startswith("hf:"):
        raise click.BadParameter("a folder of transformers is taken by gtp-vit eval only", param_hint="--model")
    if not timm.is_model(name) and name not in lvvit.MODELS:
        close = difflib.get_close_matches(name, [*timm.list_models(), *lvvit.MODELS], n=3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise click.BadParameter(f"timm {timm.__version__} has no model {name!r}{hint}", param_hint="--model")


def create_model(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """A model of timm, or an LV-ViT, whose weights come from a file only.

    Raises:
        click.UsageError: `options` are not those of this model.
        click.ClickException: its weights could not be downloaded.
    """
    import timm

    from gtp_vit import lvvit

    if name in lvvit.MODELS and pretrained:
        raise click.UsageError(f"timm has no weights of {name}: download the authors' checkpoint and give --weights")
    build = lvvit.MODELS.get(name) or partial(timm.create_model, name, pretrained=pretrained)
    try:
        model: nn.Module = build(**options)
    except Exception as error:
        # Downloads fail in many classes of huggingface_hub, httpx and the standard library.
        if pretrained:
            raise click.ClickException(f"timm could not load {name} from the hub: {first_line(error)}") from error
        if isinstance(error, RuntimeError | TypeError | ValueError | AssertionError):
            raise click.UsageError(
                f"timm cannot build {name} with {options or 'its defaults'}: {first_line(error)}"
            ) from error
        raise
    return model


def load_model(
    name: str,
    source: Path | None,
    pretrained: bool,
    seed: int,
    options: dict[str, Any],
    num_classes: int | None = None,
    new_head: bool = False,
) -> tuple[nn.Module, str]:
    """A model of timm with its weights, and where they came from: a file's name, `pretrained` or `random`.

    Args:
        source: a checkpoint; None for timm's own weights or for random ones, which `seed` decides.
        options: of timm.create_model; None stands for timm's default.
        num_classes: of the classifier; None for that of the checkpoint, or else the model's own.
        new_head: leave the classifier of the checkpoint out.

    Raises:
        click.UsageError, click.ClickException, ImportError: as :func:`check_model_name` and :func:`create_model`.
        FileNotFoundError: no such checkpoint.
        gtp_vit.weights.WeightsError: it does not fit; missing and unexpected keys are named.
    """
    check_model_name(name)
    if source is not None and pretrained:
        raise click.UsageError("--weights and --pretrained exclude each other")
    state = None if source is None else weights.read_weights(source)
    if num_classes is None and state is not None:
        num_classes = next((len(state[key]) for key in _classifier_weights(name) if key in state), None)
    options = {key: value for key, value in {**options, "num_classes": num_classes}.items() if value is not None}
    torch.manual_seed(seed)
    model = create_model(name, pretrained, **options)
    if state is None or source is None:
        return model, "pretrained" if pretrained else "random"
    if new_head:
        heads = tuple(key.removesuffix("weight") for key in _classifier_weights(name))
        state = {key: value for key, value in state.items() if not key.startswith(heads)}
        state |= {key: value for key, value in model.state_dict().items() if key.startswith(heads)}
    weights.load_weights(model, state, source=source.name)
    return model, source.name


def _classifier_weights(name: str) -> list[str]:
    """The keys of a model's classifiers in its state dict."""
    import timm

    from gtp_vit import lvvit

    if name in lvvit.MODELS:
        return ["head.weight", "aux_head.weight"]
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    classifiers = getattr(config, "classifier", None) or ()
    return [f"{key}.weight" for key in ((classifiers,) if isinstance(classifiers, str) else classifiers)]


def patched(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """`model`, patched in place; what does not fit is a click.UsageError."""
    try:
        return gtp_vit.patch(model, **options)
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error


def data_config(model: nn.Module) -> dict[str, Any]:
    """What timm.data.create_transform takes for this model, at the input size that it was built for."""
    from timm.data.config import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][-2:]
    return config | {"input_size": (config["input_size"][0], *(int(side) for side in size))}


def features(model: Any, images: Tensor) -> Tensor:
    """What the classifier would see, float32 [n, C]: the class token or the pooled tokens."""
    found: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return found.float().flatten(1)


def checked_device(device: str, backend: str | None) -> torch.device:
    """The device, and `backend` runs on it; click.BadParameter where not. `auto` is cuda where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise click.BadParameter(
            f"{device!r} cannot be used here: {first_line(error)}", param_hint="--device"
        ) from error
    if place.type == "meta":
        raise click.BadParameter("meta tensors carry no data", param_hint="--device")
    if backend is not None:
        reasons = {op: backends.refusal(backend, op, place.type) for op in backends.OPS}
        refused = [f"{op}: {reason}" for op, reason in reasons.items() if reason is not None]
        if refused:
            raise click.BadParameter(f"{backend} cannot run here. {'; '.join(refused)}", param_hint="--backend")
    return place


def check_folder(path: Path, option: str) -> None:
    """The folder that `path` shall be written to exists; click.BadParameter where not."""
    if not path.resolve().parent.is_dir():
        raise click.BadParameter(f"the folder {path.resolve().parent} does not exist", param_hint=option)


def machine(device: torch.device) -> str:
    """The processor's name for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def num_threads(count: int | None) -> Iterator[None]:
    """Runs with this many CPU threads; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """What a user can mend is a message; everything else stays a traceback."""
    try:
        yield
    except (weights.WeightsError, ImportError, OSError, torch.OutOfMemoryError) as error:
        raise click.ClickException(str(error)) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
