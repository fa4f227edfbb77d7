"""A device `mps` for machines without an Apple GPU: it computes on the CPU, and refuses what torch's own refuses.

    python tests/pretend_mps.py results.json < runs.json     runs stages on it; on a Mac, on the device itself

A tensor on it is a `Pretender`, which wraps a CPU tensor; its `device` is mps. Every operation of torch on one comes to
`dispatch`, of the forward and of the backward pass, in the small operations that autograd makes of it. It raises an
error, as torch does on a Mac, on

    a tensor of float64, complex128, float8 or unsigned 16 to 64 bits
    an operation without a kernel for mps in native_functions.yaml, the table that torch generates its dispatcher from
    a tensor of the CPU among those of mps (numbers, tensors of no dimension, excepted where torch excepts them)
    a generator of the CPU for random numbers on mps

What it cannot show: wrong results of Apple's kernels, their speed and memory, what a kernel does with a dtype that it
half supports, and what torch.autocast converts beyond the matrix products. It lasts as long as the process, so a test
starts one.

runs.json is a list of [name, stage, flags, code]: Python code that is executed before; it may patch.setattr. With no
stage it is all that runs.
results.json gets {name: [the error or "", the number of operations on mps]}.
"""

import functools
import importlib
import json
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchgen
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

from support.cli import parse_config
from support.runs import Run

aten = torch.ops.aten
MPS = torch.device("mps:0")
BACKEND = "pretender"  # what torch's C++ side calls the device; Python code sees mps
REFUSED = {torch.float64: "float64", torch.complex128: "complex128", torch.uint16: "uint16"}
REFUSED |= {torch.uint32: "uint32", torch.uint64: "uint64", torch.float8_e4m3fn: "float8", torch.float8_e5m2: "float8"}
counts = {}  # {operation: how often it ran on this device}


@functools.cache
def kernels():
    """The names of all operations with a kernel for mps, in their functional, in-place and out= forms."""
    folder = Path(torchgen.__file__).parent / "packaged/ATen/native"
    parsed = parse_native_yaml(folder / "native_functions.yaml", folder / "tags.yaml")
    table = parsed.backend_indices[DispatchKey.MPS].index
    return {str(f.func.name) for f in parsed.native_functions if (f.structured_delegate or f.func.name) in table}


class Pretender(torch.Tensor):
    """A tensor on mps; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype in REFUSED:
            raise TypeError(f"MPS framework doesn't support {REFUSED[inner.dtype]}")
        options = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), **options, device=torch.device(BACKEND, 0))

    def __init__(self, inner):
        self.inner = inner

    device = property(lambda self: MPS)
    is_mps = property(lambda self: True)

    def __tensor_flatten__(self):  # Module.to exchanges the tensors inside the parameters if it knows these two
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Pretender(inner["inner"])

    def __reduce_ex__(self, protocol):  # torch.save writes numbers, whatever the device
        return self.detach().inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return call(function, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def call(function, args, kwargs):
    """A function of torch's Python side: what must be changed or refused before the C++ side sees it."""
    if function in READ and isinstance(args[0], Pretender):  # torch's own check that the class is torch.Tensor
        return function(args[0].cpu(), *args[1:], **kwargs)
    if function is torch.Tensor.numpy and isinstance(args[0], Pretender):
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first.")
    if function is torch.Tensor.to:
        if is_there(*args, **kwargs):
            return args[0]
        args = (args[0], *map(translated, args[1:]))
    # An index and a tensor made of lists: torch switches its modes off meanwhile, so `dispatch` would not see them.
    if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
        place = args[1] if isinstance(args[1], tuple) else (args[1],)
        place = tuple(torch.tensor(i) if isinstance(i, list) else i for i in place)
        args = (args[0], place, *args[2:])
    if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
        return function(*args, **kwargs | {"device": None}).to(translated(kwargs["device"]))
    if "device" in kwargs:
        kwargs = kwargs | {"device": translated(kwargs["device"])}
    if function in PRODUCTS and torch.is_autocast_enabled("mps"):
        dtype = torch.get_autocast_dtype("mps")
        cast = functools.partial(tree_map_only, Pretender, lambda x: x.to(dtype) if x.dtype.is_floating_point else x)
        args, kwargs = cast(args), cast(kwargs)
    return function(*args, **kwargs)


READ = {torch.Tensor.tolist, torch.Tensor.__format__, torch.Tensor.__repr__}
PRODUCTS = {F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.bmm}
PRODUCTS |= {torch.Tensor.bmm, torch.mm, torch.Tensor.mm, torch.addmm, torch.baddbmm, F.scaled_dot_product_attention}


def translated(device):
    """mps as the C++ side knows it; anything else unchanged."""
    is_device = isinstance(device, str | torch.device)
    return torch.device(BACKEND, 0) if is_device and torch.device(device).type == "mps" else device


def is_there(tensor, *args, **kwargs):
    """Whether tensor.to(…) has nothing to do."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    at_home = isinstance(tensor, Pretender) and device is not None and device.type in ("mps", BACKEND)
    return at_home and dtype in (None, tensor.dtype) and not kwargs.get("copy")


class Functions(TorchFunctionMode):
    """Sends the functions of torch's Python side to `call`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


class Device(TorchDispatchMode):
    """Sends what creates a tensor on mps to `dispatch`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


mode = Device()


def inner(x):
    """An argument as the CPU takes it."""
    if isinstance(x, Pretender):
        return x.inner
    return type(x)(map(inner, x)) if type(x) in (list, tuple) else x


def tensors_of(values):
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif type(x) in (list, tuple):
            yield from tensors_of(x)


class Facts:
    """Of an operation, from its schema."""

    def __init__(self, func):
        schema = func._schema
        self.name = str(func).removeprefix("aten.").removesuffix(".default")  # as in native_functions.yaml
        self.has_kernel = func.is_view or self.name in kernels() or is_allocation(self.name)
        self.takes = {a.name: a.type.kind() for a in schema.arguments}
        self.written = {}  # {set of aliases: (number, name) of the argument that is written}
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written |= dict.fromkeys(argument.alias_info.before_set, (i, argument.name))
        self.returns = [r.alias_info and next(iter(r.alias_info.before_set), None) for r in schema.returns]


facts_of = functools.cache(Facts)


def dispatch(func, args, kwargs):
    """One operation, its tensors on any devices."""
    tensors = list(tensors_of((*args, *kwargs.values())))
    ours = any(isinstance(x, Pretender) for x in tensors)
    device = kwargs.get("device")
    onto = device is not None and torch.device(device).type in ("mps", BACKEND)
    if not ours and not onto:
        return func(*args, **kwargs)

    facts = facts_of(func)
    counts[facts.name] = counts.get(facts.name, 0) + 1
    if func in (aten._to_copy.default, aten.copy_.default):  # the operations that may cross from device to device
        if ours and kwargs.get("dtype", inner(args[0]).dtype) in REFUSED:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    else:
        if ours and not all(isinstance(x, Pretender) for x in tensors):
            refuse_mixture(func, facts.name, tensors)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != "mps":
            raise RuntimeError(f"Expected a 'mps' device type for generator but found '{generator.device.type}'")
        if not facts.has_kernel:
            return composed(func, facts.name, args, kwargs)

    own_args, own_kwargs = inner(args), {name: inner(x) for name, x in kwargs.items()}
    if device is not None:
        own_kwargs["device"] = torch.device("cpu")
    if "generator" in facts.takes:
        own_kwargs["generator"] = torch.mps._default_mps_generator
    # torch has made a number of a tensor argument that was one: the overload for numbers takes it
    kinds = zip(facts.takes.values(), own_args, strict=False)
    number = any(kind == "TensorType" and isinstance(x, int | float) for kind, x in kinds)
    with no_dispatch():
        out = (SUBSTITUTES.get(facts.name) or (func.overloadpacket if number else func))(*own_args, **own_kwargs)
    return out if device is not None and not onto else on_mps(func, facts, args, kwargs, out)


def on_mps(func, facts, args, kwargs, out):
    """The result on mps: the argument itself where the operation writes into it, else a new Pretender."""
    # in inference mode a view of a tensor from outside is as that one is
    inference = torch.is_inference_mode_enabled() and not (func.is_view and not args[0].is_inference())

    def wrapped(x):
        if isinstance(x, torch.Tensor):
            with torch.inference_mode(inference):
                return Pretender(x)
        return list(map(wrapped, x)) if isinstance(x, list) else x

    def result(alias, x):
        i, name = facts.written.get(alias, (None, None))
        return wrapped(x) if i is None else args[i] if i < len(args) else kwargs[name]

    if len(facts.returns) > 1:
        return tuple(map(result, facts.returns, out))
    return result(facts.returns[0], out) if facts.returns else None


def composed(func, name, args, kwargs):
    """An operation that has no kernel of its own: torch composes it of others, each of which comes back here."""
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "PrivateUse1"):
        raise NotImplementedError(
            f"The operator 'aten::{name}' is not currently implemented for the MPS device. As a temporary fix, you can "
            "set the environment variable `PYTORCH_ENABLE_MPS_FALLBACK=1` to use the CPU as a fallback for this op."
        )
    kwargs = {k: torch.device(BACKEND, 0) if k == "device" and v is not None else v for k, v in kwargs.items()}
    with mode:
        out = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1), *args, **kwargs)
    # `out` may have been made empty, and then written by an operation that resized what is inside
    return tree_map_only(Pretender, lambda x: x if x.shape == x.inner.shape else Pretender(x.inner), out)


def is_allocation(name):
    """Whether an operation makes or copies a tensor and computes nothing: torch composes these of `empty` and `fill_`
    for every device."""
    word = name.partition(".")[0]
    return word in ALLOCATIONS or word.startswith("new_") or word.endswith("_like")


ALLOCATIONS = {
    "empty",
    "empty_strided",
    "zeros",
    "ones",
    "full",
    "clone",
    "scalar_tensor",
    "detach",
    "lift_fresh",
    "lift",
}
ALLOCATIONS |= {"_unsafe_view", "_reshape_alias", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"}


def native_dropout(x, p, train):
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=torch.mps._default_mps_generator)
    return x * keep / (1 - p), keep


SUBSTITUTES = {"native_dropout": native_dropout}  # the CPU's draws from the CPU's generator


def refuse_mixture(func, name, tensors):
    """RuntimeError if a tensor of the CPU is among those of mps where torch does not take it."""
    others = [x for x in tensors if not isinstance(x, Pretender)]
    if name.startswith(("index.", "index_put", "_index_put", "_unsafe_index")) and isinstance(tensors[0], Pretender):
        others = [x for x in others if x.dtype not in (torch.int64, torch.int32, torch.bool)]  # torch moves indices
    lenient = torch.Tag.pointwise in func.tags or name.startswith(("masked_fill", "fill_", "index_put", "_index_put"))
    if any(x.dim() > 0 or not lenient for x in others):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, mps:0 and cpu! ({name})"
        )


def install():
    """Make this process believe that it has an Apple GPU."""
    _setup_privateuseone_for_python_backend(BACKEND)
    torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True
    torch.mps._default_mps_generator = torch.Generator()
    torch.mps.manual_seed = lambda seed: torch.mps._default_mps_generator.manual_seed(seed)
    torch.mps.recommended_max_memory = lambda: 8 * 2**30
    torch.mps.current_allocated_memory = torch.mps.driver_allocated_memory = lambda: 2**30
    _foreach_utils._get_foreach_kernels_supported_devices = lambda: ["cuda", "xpu"]
    torch.nn.utils.clip_grad._has_foreach_support.__globals__["_get_foreach_kernels_supported_devices"] = (
        _foreach_utils._get_foreach_kernels_supported_devices
    )
    torch.autograd.set_multithreading_enabled(False)  # an error in a thread of the engine's would end the process
    mode.__enter__()
    Functions().__enter__()


def run_all(runs):
    """Run the stages one after another -> {name: [error or "", operations on mps]}."""
    results = {}
    for name, stage, flags, code in runs:
        counts.clear()
        try:
            with pytest.MonkeyPatch.context() as patch:
                exec(code, {"patch": patch})
                if stage:
                    module = importlib.import_module(stage)
                    module.main(parse_config(module.Config, flags))
            error = ""
        except BaseException:  # SystemExit too: the next run goes on
            error = traceback.format_exc()
        Run.close_log()  # another process may take over its directory
        results[name] = [error, sum(counts.values())]
    return results


if __name__ == "__main__":
    if not torch.backends.mps.is_available():
        install()
    Path(sys.argv[1]).write_text(json.dumps(run_all(json.load(sys.stdin))), encoding="utf-8")
