"""A device `npy` that is not the CPU, within `with EmulatedDevice():`.

It computes on the CPU. But its tensors cannot be mixed with the CPU's, nor be turned into NumPy
without .cpu(), as on a GPU; and there is no float64, as on Apple's mps.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("npy")
for name, function in {
    "get_amp_supported_dtype": lambda: [torch.bfloat16],
    "_is_in_bad_fork": lambda: False,
    "manual_seed_all": lambda seed: None,
}.items():
    setattr(torch.npy, name, function)

MAY_MIX = ("_to_copy", "copy_", "index")  # as on a GPU


class DeviceTensor(torch.Tensor):
    """What it holds is a CPU tensor, `raw`."""

    @staticmethod
    def __new__(cls, raw):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        tensor = cls._make_wrapper_subclass(
            cls, raw.shape, dtype=raw.dtype, device="npy:0", **layout
        )
        tensor.raw = raw
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    def __reduce_ex__(self, protocol):  # what torch.save keeps
        return self.raw.__reduce_ex__(protocol)

    def tolist(self):
        return self.raw.tolist()


class EmulatedDevice(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args, kwargs):
    """An operation on the tensors' CPU tensors; what comes out is on the device again."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    wrappers = {id(leaf.raw): leaf for leaf in tensors if isinstance(leaf, DeviceTensor)}
    others = [leaf for leaf in tensors if leaf.device.type == "cpu" and leaf.dim() > 0]
    if wrappers and others and not any(part in str(operation) for part in MAY_MIX):
        raise RuntimeError(f"{operation} mixes the device with CPU tensors: {others}")
    on_device = bool(wrappers)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, DeviceTensor):
            leaves[i] = leaf.raw
        elif isinstance(leaf, torch.device):
            on_device = leaf.type == "npy"
            leaves[i] = torch.device("cpu")
    args, kwargs = pytree.tree_unflatten(leaves, structure)

    def wrap(result):
        if not on_device or not isinstance(result, torch.Tensor):
            return result
        if result.dtype == torch.float64:
            raise TypeError(f"the device has no float64, {operation} makes one")
        if id(result) in wrappers:
            return wrappers[id(result)]  # what was changed in place
        return DeviceTensor(result)

    return pytree.tree_map(wrap, operation(*args, **kwargs))


# Where PyTorch makes a tensor of a list, as in x[:, [0, 2]], it does not ask EmulatedDevice.
def empty_strided(size, stride, dtype, **options):
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source, target, non_blocking=False):
    return compute(torch.ops.aten.copy_.default, (target, source), {})


library = torch.library.Library("aten", "IMPL")
library.impl("empty_strided", empty_strided, "PrivateUse1")
library.impl("_copy_from", copy_from, "PrivateUse1")


def load(path, map_location, **options):
    """torch.load; the device has no storage to load to."""
    content = load_on_cpu(path, map_location="cpu", **options)
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(map_location), content)


load_on_cpu = torch.load
torch.load = load
