"""Routes from a network to a runtime's file. A new one is a file and a line here."""

from sft.exporters.base import Exporter, export, exporters, storage_of
from sft.exporters.onnxruntime import OnnxRuntimeExporter
from sft.exporters.packed import load, save_packed
from sft.exporters.storage import Storage, mean_bits

exporters.add(OnnxRuntimeExporter.runtime, OnnxRuntimeExporter())

__all__ = [
    "Exporter", "Storage", "export", "exporters", "load", "mean_bits", "save_packed", "storage_of",
]  # fmt: skip
