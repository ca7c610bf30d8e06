"""Who reads which value of an ONNX graph, bodies of loops and branches included."""

import itertools
import string
from collections.abc import Collection, Iterator

import onnx
from onnx import NodeProto

Reader = tuple[NodeProto, int]


def walk(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    """Every node, also those of graphs inside nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from walk(inner)


def readers_of(graph: onnx.GraphProto) -> dict[str, list[Reader]]:
    """For each value that is read: the nodes that read it, and as which input."""
    found: dict[str, list[Reader]] = {}
    for node in walk(graph):
        for index, name in enumerate(node.input):
            found.setdefault(name, []).append((node, index))
    return found


def drop_unread_constants(graph: onnx.GraphProto) -> None:
    """Remove initialisers that no node reads and that are no output."""
    wanted = set(readers_of(graph)) | {o.name for o in graph.output}
    wanted |= {o.name for node in walk(graph) for a in node.attribute for o in a.g.output}
    kept = [t for t in graph.initializer if t.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def short_names(taken: Collection[str]) -> Iterator[str]:
    """a, b, ..., z, aa, ab, ... without those that are taken."""
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            name = "".join(letters)
            if name not in taken:
                yield name


def names_in(graph: onnx.GraphProto) -> set[str]:
    """The name of every value of the graph and of the graphs inside its nodes."""
    found = {v.name for v in (*graph.input, *graph.output, *graph.initializer)}
    return found.union(*({*node.input, *node.output} for node in walk(graph)))
