"""A GPU that isn't here: CPU tensors that say they are on it, and kernels that run interpreted on them.

Every operation on a ``Far`` tensor is done on the CPU tensor behind it, so that values and what depends on them are
real; the result says it is on the same device. What a GPU would refuse or wait for is an error:
an operation on tensors of two devices, and one that makes a CPU tensor of one or more dimensions.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

CROSSES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)  # between devices, as they are asked to
# without CUDA these stop before they come to ``__torch_dispatch__``
ASKS_FOR_CUDA = ("__getitem__", "__setitem__", "__invert__", "__int__", "__float__", "__bool__", "__index__")
ASKS_FOR_CUDA += ("tolist", "item", "nonzero", "contiguous", "copy_")
READS = (torch.ops.aten._local_scalar_dense.default,)


class Far(torch.Tensor):
    @staticmethod
    def __new__(cls, near, device):
        far = torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device="meta",
            dispatch_device=True,
        )
        far.near, far.far_device = near, torch.device(device)
        return far

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].far_device
        raise AssertionError(f"{func} outside of far_away()")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ not in ASKS_FOR_CUDA:
            return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        far = next(one for one in args if isinstance(one, Far))
        for one in tree_flatten((args, kwargs))[0]:
            if isinstance(one, torch.Tensor) and one.ndim and one.device != far.device:
                raise AssertionError(f"{func} on tensors of {far.device} and {one.device}")
        with _disable_current_modes():
            made = func(*near(args), **near(kwargs or {}))
        return tree_map_only(torch.Tensor, lambda one: far if one is far.near else Far(one, far.device), made)

    def __repr__(self):
        return f"Far({self.near}, device={self.device})"


def near(value):
    """The CPU tensors behind a structure of tensors."""
    return tree_map_only(Far, lambda far: far.near, value)


class _FarAway(TorchDispatchMode):
    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # or torch looks for CUDA where ``device="cuda"`` is asked for

    def __init__(self, device, cpu_is_fine):
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.far_device, self.cpu_is_fine = device, cpu_is_fine

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].far_device
        kwargs = dict(kwargs or {})
        given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
        wide = {one.device for one in given if one.ndim}
        if func not in CROSSES and len(wide) > 1:
            raise AssertionError(f"{func} on tensors of {wide}")
        device = next((one.device for one in given if isinstance(one, Far)), torch.device("cpu"))
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            kwargs["device"] = torch.device("cpu")
        if device.type != "cpu" and device != self.far_device:
            raise AssertionError(f"{func} on {device}: everything is on {self.far_device}")
        made = _on_cpu(func, near(args), near(kwargs))
        known = {id(one.near): one for one in given if isinstance(one, Far)}

        def label(tensor):
            if id(tensor) in known:
                return known[id(tensor)]  # changed in place, or given as ``out``
            if device.type != "cpu":
                return Far(tensor, device)
            if tensor.ndim and func not in READS and not self.cpu_is_fine:
                raise AssertionError(f"{func} makes a CPU tensor {tuple(tensor.shape)}")
            return tensor

        return tree_map_only(torch.Tensor, label, made)


def _on_cpu(func, args, kwargs):
    """The products with float32 results of half operands are CUDA's alone."""
    name = str(func)
    if "dtype" in name and name.startswith(("aten.mm", "aten.addmm")):
        *operands, dtype = [one.to(args[-1]) if isinstance(one, torch.Tensor) else one for one in args]
        product = torch.mm if name.startswith("aten.mm") else torch.addmm
        out = product(*operands).to(dtype)
        return kwargs["out"].copy_(out) if "out" in kwargs else out
    return func(*args, **kwargs)


@contextmanager
def far_away(device, *, cpu_is_fine=False):
    """``cpu_is_fine``: numbers are drawn on the CPU on purpose, the same for every device."""
    torch._C._ensureCUDADeviceGuardSet()  # without CUDA: a guard that does nothing
    with torch.no_grad(), _FarAway(device, cpu_is_fine):
        yield


class CurrentDevice:
    """Stands for ``torch.cuda.device``, and knows which one is current."""

    def __init__(self):
        self.current = torch.device("cuda:0")

    @contextmanager
    def __call__(self, device):
        before, self.current = self.current, torch.device(device)
        yield
        self.current = before


class InterpretedKernel:
    """Stands for a kernel: checks that its tensors are on the current device, and runs it on what is behind them."""

    def __init__(self, kernel, current, launched):
        self.kernel, self.current, self.launched = kernel, current, launched

    def __getitem__(self, grid):
        def run(*args, **options):
            tensors = [one for one in tree_flatten((args, options))[0] if isinstance(one, torch.Tensor)]
            assert tensors and {one.device for one in tensors} == {self.current.current}
            assert all(isinstance(one, Far) for one in tensors)
            self.launched.append(self.kernel.fn.__name__)
            with _disable_current_modes():
                self.kernel[grid](*near(args), **near(options))

        return run
