"""What is left out of a file, and what must stay."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from sft.exporters import exporters
from sft.exporters.slimming import drop_default_attributes, shorten_names


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, groups=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    ).eval()


def written(path, network: nn.Module) -> onnx.GraphProto:
    exporters["onnxruntime"].write(network, torch.zeros(1, 2, 6, 6), path)
    return onnx.load(path).graph


def test_values_have_short_names_and_parameters_their_own(tmp_path) -> None:
    graph = written(tmp_path / "m.onnx", small())
    assert {"0.weight", "0.bias"} <= {t.name for t in graph.initializer}
    visible = {v.name for v in (*graph.input, *graph.output)}
    inner = {o for n in graph.node for o in n.output} - visible
    assert inner
    assert all(len(name) == 1 for name in inner)
    assert [bool(n.name) for n in graph.node] == [n.op_type == "Conv" for n in graph.node]


def test_assumed_attributes_are_left_out_and_others_stay(tmp_path) -> None:
    graph = written(tmp_path / "m.onnx", small())
    conv = next(n for n in graph.node if n.op_type == "Conv")
    names = {a.name for a in conv.attribute}
    assert not names & {"group", "auto_pad"}
    assert "pads" in names


def test_only_the_default_is_dropped() -> None:
    for group, kept in ((1, []), (2, ["group"])):
        node = helper.make_node("Conv", ["x", "w"], ["y"], group=group)
        proto = helper.make_model(helper.make_graph([node], "g", [], []))
        drop_default_attributes(proto)
        assert [a.name for a in proto.graph.node[0].attribute] == kept


def test_the_slim_file_computes_the_network(tmp_path) -> None:
    network = small()
    written(tmp_path / "m.onnx", network)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"]
    )
    x = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, network(x).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_short_name_that_is_taken_is_not_given_again(name: str) -> None:
    nodes = [helper.make_node("Neg", [name], ["first"]), helper.make_node("Abs", ["first"], ["z"])]
    values = [helper.make_tensor_value_info(v, TensorProto.FLOAT, (1,)) for v in (name, "z")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    shorten_names(graph, kept=())
    assert graph.node[0].output[0] not in (name, "z", "first")
    assert graph.node[1].input[0] == graph.node[0].output[0]
    onnx.checker.check_model(helper.make_model(graph))


def test_names_stay_where_a_branch_may_read_them() -> None:
    inner = helper.make_graph(
        [helper.make_node("Neg", ["outer"], ["r"])], "i", [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, (1,))],
    )  # fmt: skip
    nodes = [
        helper.make_node("Abs", ["x"], ["outer"]),
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
    ]
    graph = helper.make_graph(nodes, "g", [], [])
    shorten_names(graph, kept=())
    assert graph.node[0].output[0] == "outer"
