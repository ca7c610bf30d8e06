"""An exported program (`.pt2`) as a tree of ordinary modules.

`torch.export` keeps a network as a graph of operators that read parameters by name. Here each
convolution, linear and batch norm operator becomes a call of an `nn.Conv2d`, ... again, under the
name that its weight has always had ("stages.0.0.conv1"), so that layers are found and replaced by
name as in any other network. Operators whose weight is not such a parameter stay as they are.
"""

import io
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_structure

from sft.core.errors import InputError
from sft.core.files import check_manifest, read_bytes
from sft.models.quote import one_line

aten = torch.ops.aten
MODULES: dict[Any, type[nn.Module]] = {
    aten.conv1d.default: nn.Conv1d,
    aten.conv1d.padding: nn.Conv1d,
    aten.conv2d.default: nn.Conv2d,
    aten.conv2d.padding: nn.Conv2d,
    aten.conv3d.default: nn.Conv3d,
    aten.conv3d.padding: nn.Conv3d,
    aten.conv_transpose1d.default: nn.ConvTranspose1d,
    aten.conv_transpose2d.input: nn.ConvTranspose2d,
    aten.conv_transpose3d.input: nn.ConvTranspose3d,
    aten.linear.default: nn.Linear,
}
BATCH_NORMS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
ROLES = ("weight", "bias", "running_mean", "running_var")
TRACKED = "num_batches_tracked"
UNSAFE_RECORDS = ("data/constants/custom_obj", "data/constants/opaque_obj", "data/aotinductor")

Recipe = tuple[type[nn.Module], dict[str, Any]]
"""A module's class, and the arguments that make it."""


def read_program(path: Path) -> ExportedProgram:
    """Read a file of `torch.export.save`; to be called where `torch.load` is held to tensors.

    Nothing in it is unpickled, yet a program is a program: open only files that you trust.
    """
    from torch.export.pt2_archive import PT2ArchiveReader  # as slow to import as all of torch

    check_manifest(path)
    content = read_bytes(path)
    try:
        names = PT2ArchiveReader(io.BytesIO(content)).get_file_names()
    except Exception as error:
        raise InputError(
            f"'{path}' is not a file of this torch's torch.export.save ({one_line(error)})."
        ) from error
    unsafe = [n for n in names if n.lower().startswith(UNSAFE_RECORDS)]
    if unsafe:
        raise InputError(
            f"'{path}' holds pickled objects or compiled code ('{unsafe[0]}'), and SFT runs "
            "neither. Export a model of plain tensors."
        )
    try:
        return torch.export.load(io.BytesIO(content))
    except Exception as error:
        raise InputError(f"'{path}' cannot be loaded: {one_line(error)}") from error


def module_tree(program: ExportedProgram, source: str = "program") -> fx.GraphModule:
    """The program as a module in eval mode, with layers as sub-modules and the same outputs.

    source : where the program is from, for error messages.

    Raises `InputError` if it was exported in training mode.
    """
    flat = program.module(check_guards=False)
    _plain_signature(flat.graph, program)
    tree = fx.GraphModule(flat, flat.graph, class_name="Exported")
    calls: dict[str, dict[fx.Node, Recipe]] = defaultdict(dict)
    for node in tree.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            arguments = _arguments(node)
            _check_eval(node, arguments, source)
            recipe, name = _recipe(tree, node, arguments), _owner(arguments)
            if recipe is not None and name is not None:
                calls[name][node] = recipe
    for name, recipes in calls.items():
        if _is_whole(tree, name, recipes):
            _give_module(tree, name, recipes)
    for node in tree.graph.find_nodes(op="get_attr"):
        if not node.users:
            tree.graph.erase_node(node)
    tree.recompile()
    tree.eval()
    return tree


def _plain_signature(graph: fx.Graph, program: ExportedProgram) -> None:
    """`forward(x)` without nested arguments, if it takes a tensor and returns one or a tuple."""
    takes, returns = program.call_spec.in_spec, program.call_spec.out_spec
    if takes is None or returns is None or takes != tree_structure(((0,), {})):
        return
    output = graph.output_node()
    leaves = cast(tuple[fx.Node, ...], output.args[0])
    if returns == tree_structure(0):
        output.args = (leaves[0],)
    elif returns != tree_structure((0,) * len(leaves)):
        return
    graph.set_codegen(fx.graph.CodeGen())


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of an operator by its name, defaults filled in."""
    target = cast(torch._ops.OpOverload, node.target)
    given = dict(zip((a.name for a in target._schema.arguments), node.args, strict=False))
    defaults = {a.name: a.default_value for a in target._schema.arguments}
    return {**defaults, **given, **node.kwargs}


def _check_eval(node: fx.Node, arguments: dict[str, Any], source: str) -> None:
    normalises = node.target is aten.batch_norm.default and arguments["running_mean"] is not None
    drops = node.target in (aten.dropout.default, aten.feature_dropout.default)
    if (normalises and arguments["training"]) or (drops and arguments["train"]):
        raise InputError(
            f"'{source}' was exported in training mode ('{node.name}' behaves as in training). "
            "Call model.eval() before torch.export.export."
        )


def _owner(arguments: dict[str, Any]) -> str | None:
    """'a.b' if the operator's tensors are 'a.b.weight', 'a.b.bias', ...; else None."""
    read = {role: arguments[role] for role in ROLES if arguments.get(role) is not None}
    owners = set()
    for role, node in read.items():
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        owner, _, leaf = str(node.target).rpartition(".")
        owners.add(owner if leaf == role else "")
    return owners.pop() if len(owners) == 1 and "" not in owners else None


def _recipe(tree: fx.GraphModule, node: fx.Node, arguments: dict[str, Any]) -> Recipe | None:
    """The class and arguments of the module that does what the operator does."""
    if node.target is aten.batch_norm.default:
        return _batch_norm_recipe(arguments)
    kind = MODULES.get(node.target)
    weight = _parameter(tree, arguments["weight"]) if kind else None
    if kind is None or weight is None:
        return None
    bias = arguments["bias"] is not None
    if kind is nn.Linear:
        return kind, {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias}
    sides, groups = weight.ndim - 2, arguments["groups"]
    transposed = "output_padding" in arguments
    first, second = weight.shape[0], weight.shape[1] * groups
    made = {
        "in_channels": first if transposed else second,
        "out_channels": second if transposed else first,
        "kernel_size": tuple(weight.shape[2:]),
        "groups": groups,
        "bias": bias,
    }
    for name in ("stride", "padding", "dilation", "output_padding"):
        if name in arguments:
            made[name] = _per_side(arguments[name], sides)
    return kind, made


def _batch_norm_recipe(arguments: dict[str, Any]) -> Recipe | None:
    given = [arguments[role] is not None for role in ROLES]
    affine, tracked = given[0], given[2]
    kind = BATCH_NORMS.get(arguments["input"].meta["val"].ndim)
    if kind is None or given != [affine, affine, tracked, tracked]:
        return None
    channels = next(arguments[r] for r in ROLES if arguments[r] is not None).meta["val"].shape[0]
    return kind, {
        "num_features": channels,
        "eps": arguments["eps"],
        "momentum": arguments["momentum"],
        "affine": affine,
        "track_running_stats": tracked,
    }


def _parameter(tree: fx.GraphModule, node: Any) -> nn.Parameter | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, leaf = str(node.target).rpartition(".")
    return tree.get_submodule(owner)._parameters.get(leaf)


def _per_side(value: Any, sides: int) -> Any:
    """A stride, padding or dilation as one number a side; a padding by name as it is."""
    if isinstance(value, str):
        return value
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * sides if len(values) == 1 else values


def _is_whole(tree: fx.GraphModule, name: str, recipes: dict[fx.Node, Recipe]) -> bool:
    """Whether one module can stand for all of these calls, and nothing else reads its tensors."""
    old, first = tree.get_submodule(name), next(iter(recipes.values()))
    alike = all(recipe == first for recipe in recipes.values())
    known = {*old._parameters, *old._buffers} <= {*ROLES, TRACKED}
    readers = {
        user
        for node in tree.graph.find_nodes(op="get_attr")
        if str(node.target).rpartition(".")[0] == name
        for user in node.users
    }
    return alike and known and not old._modules and readers == set(recipes)


def _give_module(tree: fx.GraphModule, name: str, recipes: dict[fx.Node, Recipe]) -> None:
    """Put the module at `name`, with the tensors that are there, and call it in each place."""
    kind, arguments = next(iter(recipes.values()))
    old, module = tree.get_submodule(name), kind(**arguments, device="meta")
    for leaf, tensor in [*old._parameters.items(), *old._buffers.items()]:
        setattr(module, leaf, tensor)
    tree.set_submodule(name, module)
    for node in recipes:
        with tree.graph.inserting_before(node):
            call = tree.graph.call_module(name, (_arguments(node)["input"],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        tree.graph.erase_node(node)
