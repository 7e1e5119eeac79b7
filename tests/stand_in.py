"""Run a script on a stand-in for a GPU. --device=auto finds the stand-in, which computes on the CPU.

    python tests/stand_in.py train.py configs/gqa_deep.py --max_steps=3

For torch, the stand-in is a separate device. Operations that mix it with the CPU fail. float64
fails, too, as on Apple's GPUs. The script waits for the device whenever it reads a value. The last
line of the output has the number of waits.
"""
from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
COPIES = ("aten::_to_copy", "aten::copy_")
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")
waits: Counter[str] = Counter()


class Backend(_DummyBackendModule):
    def synchronize(self, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class OnDevice(Tensor):
    """A tensor on the device. Its values are in `host`."""
    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        if host.dtype == torch.float64:
            raise TypeError("float64 on a device that has none")
        out = Tensor._make_wrapper_subclass(cls, host.size(), strides=host.stride(), dtype=host.dtype, device=DEVICE,
                                            storage_offset=host.storage_offset())
        out.host = host
        return out

    def tolist(self) -> list:                                # torch's does not work for a subclass
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        elsewhere = [x for x in given if not isinstance(x, OnDevice)]
        if name not in COPIES and any(x.dim() > 0 for x in elsewhere):
            raise RuntimeError(f"{name} mixes the device with the CPU")
        to_host = kwargs.get("device") == torch.device("cpu") or (
            name == "aten::copy_" and not isinstance(args[0], OnDevice))
        by_mask = name == "aten::index" and any(x.dtype == torch.bool for x in given[1:])
        if to_host or by_mask or name in WAITS:
            waits[name] += 1

        plain = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
        host_args, host_kwargs = tree_map(lambda x: x.host if isinstance(x, OnDevice) else x, (args, plain))
        out = func(*host_args, **host_kwargs)
        if to_host:
            return out
        out = tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, out)
        return return_and_correct_aliasing(func, args, kwargs, out)


def empty(size: Any, dtype: torch.dtype | None = None, **_: Any) -> OnDevice:
    return OnDevice(torch.empty(size, dtype=dtype))


def empty_strided(size: Any, stride: Any, dtype: torch.dtype | None = None, **_: Any) -> OnDevice:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source: Tensor, target: OnDevice, non_blocking: bool = False) -> OnDevice:
    target.host.copy_(source)
    return target


_setup_privateuseone_for_python_backend("stand_in", backend_module=Backend())
DEVICE = torch.device("stand_in", 0)
LIBRARY = torch.library.Library("aten", "IMPL")              # torch derives the other operations from these
LIBRARY.impl("empty.memory_format", empty, "PrivateUse1")
LIBRARY.impl("empty_strided", empty_strided, "PrivateUse1")
LIBRARY.impl("_copy_from", copy_from, "PrivateUse1")

if __name__ == "__main__":
    import data
    import probe
    importlib.import_module("train")                # its imports need the original Generator

    generator = torch.Generator                              # torch has no generator for this device
    torch.Generator = lambda device="cpu": generator()
    probe.TOKENS_AT_ONCE = 1                         # so that there are several micro-batches
    sys.argv = sys.argv[1:]
    try:
        data.run(importlib.import_module(Path(sys.argv[0]).stem).main)
    finally:
        print(f"waited {waits.total()} times: {dict(waits)}")
