"""Routes from a network to a runtime's file. A new one is a file and a line here."""

from sft.exporters.base import Exporter, export, exporters
from sft.exporters.onnxruntime import OnnxRuntimeExporter
from sft.exporters.packed import load, save_packed

exporters.add(OnnxRuntimeExporter.runtime, OnnxRuntimeExporter())

__all__ = ["Exporter", "export", "exporters", "load", "save_packed"]
