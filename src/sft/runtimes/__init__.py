"""Which targets exist, and how a file runs, is timed and is profiled in a child process.

A runtime is one adapter file and one line here. The entry is "module:class", imported only in the
child that runs the file, so that a runtime which crashes, prints or is not installed does no harm.
"""

from sft.core.registry import Registry

RUNTIMES: Registry[str] = Registry("runtime")
RUNTIMES.add("onnxruntime", "sft.runtimes.onnxruntime:OnnxRuntime")
